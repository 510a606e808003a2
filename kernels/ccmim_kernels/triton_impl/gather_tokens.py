"""These kernels of `gather_tokens` move rows of tokens by index, and back."""

# B batch, L patches, K kept, P prefix tokens, D width, T rows of a program

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.triton_impl.launch import launch, rows_contiguous, tile_for


@triton.jit
def copy_prefix(prefix_ptr, target_ptr, P, D, BLOCK_D: tl.constexpr):
    """Copy the P shared rows to the first rows of one image."""
    for row in range(P):
        for start in range(0, D, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            x = tl.load(prefix_ptr + row * D + column, mask=column < D)
            tl.store(target_ptr + row * D + column, x.to(target_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def copy_rows(source, target, read, written, D, BLOCK_D: tl.constexpr):
    """Copy the rows of D values that start at `source` [T, 1] to `target`; a row that is not `read` is zeros."""
    for start in range(0, D, BLOCK_D):
        column = (start + tl.arange(0, BLOCK_D))[None, :]
        x = tl.load(source + column, mask=read & (column < D), other=0.0)
        tl.store(target + column, x, mask=written & (column < D))


@triton.jit(do_not_specialize=["K", "P", "tiles"])
def ccmim_gather_tokens_kernel(
    tokens_ptr,  # [B, L, D] float, rows contiguous
    ids_ptr,  # [B, K] int64
    prefix_ptr,  # [P, D] float
    out_ptr,  # [B, P + K, D] as tokens, out
    K,
    P,
    tiles,
    D,
    stride_b,
    stride_l,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Take one tile of rows of one image. Replaces: expand, gather, cat. Moves 2 * B * (P + K) * D values."""
    program = tl.program_id(0).to(tl.int64)
    image = program // tiles
    target_ptr = out_ptr + image * (P + K) * D
    if program % tiles == 0:
        copy_prefix(prefix_ptr, target_ptr, P, D, BLOCK_D)
    row = (program % tiles) * TOKENS + tl.arange(0, TOKENS)
    valid = (row < K)[:, None]
    index = tl.load(ids_ptr + image * K + row, mask=row < K, other=0)
    source = tokens_ptr + (image * stride_b + index * stride_l)[:, None]
    copy_rows(source, target_ptr + ((P + row) * D)[:, None], valid, valid, D, BLOCK_D)


@triton.jit
def position_of(value, list_ptr, length, CHUNK: tl.constexpr):
    """Find the place of each `value` [T], -1 or more, in a list of distinct indices in memory; -1 where it has none."""
    position = tl.full(value.shape, -1, tl.int64)
    for start in range(0, length, CHUNK):
        place = start + tl.arange(0, CHUNK)
        entry = tl.load(list_ptr + place, mask=place < length, other=-2)
        found = tl.where(value[:, None] == entry[None, :], place[None, :].to(tl.int64), -1)
        position = tl.maximum(position, tl.max(found, 1))
    return position


@triton.jit(do_not_specialize=["L", "K", "P", "first", "tiles"])
def ccmim_scatter_tokens_kernel(
    grad_ptr,  # [B, P + K, D] float, contiguous
    ids_ptr,  # [B, K] int64
    out_ptr,  # [B, L, D] as grad, out
    L,
    K,
    P,
    first,
    tiles,
    D,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the gradient of a gather densely: each row once, zeros where nothing was taken. Moves B (K + L) D values.

    Row r is row P + j of `grad`, where ids[j] = r - first. With P = first = 1 row 0 is its row 0.
    """
    program = tl.program_id(0).to(tl.int64)
    image = program // tiles
    row = (program % tiles) * TOKENS + tl.arange(0, TOKENS)
    position = position_of(row - first, ids_ptr + image * K, K, 32)
    taken = ((row < L) & ((position >= 0) | (row < first)))[:, None]
    source = grad_ptr + ((image * (P + K) + P + position) * D)[:, None]
    copy_rows(source, out_ptr + ((image * L + row) * D)[:, None], taken, (row < L)[:, None], D, BLOCK_D)


def gather_tokens(tokens_BLD: Tensor, ids_BK: Tensor, prefix_PD: Tensor | None) -> Tensor:
    """Launch the kernel of `gather_tokens`."""
    B, _, D = tokens_BLD.shape
    K, P = ids_BK.shape[1], 0 if prefix_PD is None else len(prefix_PD)
    tokens_BLD = rows_contiguous(tokens_BLD)
    out_BTD = torch.empty(B, P + K, D, dtype=tokens_BLD.dtype, device=tokens_BLD.device)
    tile = tile_for(D)
    # Without rows too, the prefix is written.
    tiles = max(1, triton.cdiv(K, tile["TOKENS"]))
    tensors = (tokens_BLD, ids_BK.contiguous(), out_BTD if prefix_PD is None else prefix_PD.contiguous(), out_BTD)
    strides = tokens_BLD.stride()[:2]
    launch(ccmim_gather_tokens_kernel, B * tiles, *tensors, K, P, tiles, D, *strides, **tile)
    return out_BTD


def scatter_tokens(grad_BTD: Tensor, ids_BK: Tensor, rows: int, first: int = 0) -> Tensor:
    """Launch the kernel that takes [B, P + K, D] to [B, rows, D]."""
    B, T, D = grad_BTD.shape
    K = ids_BK.shape[1]
    out_BLD = torch.empty(B, rows, D, dtype=grad_BTD.dtype, device=grad_BTD.device)
    tile = tile_for(D)
    tiles = triton.cdiv(rows, tile["TOKENS"])
    tensors = (grad_BTD.contiguous(), ids_BK.contiguous(), out_BLD)
    launch(ccmim_scatter_tokens_kernel, B * tiles, *tensors, rows, K, T - K, first, tiles, D, **tile)
    return out_BLD
