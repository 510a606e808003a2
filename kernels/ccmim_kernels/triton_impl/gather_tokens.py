"""These kernels of `gather_tokens` move rows of tokens by index, and back.

Instructions take 20 to 23 % of the time of the bytes on an H200 (benchmarks/results/2026-11-30-audit-after-tokens.md).
"""

# B batch, L patches, K kept, P prefix tokens, D width, T rows of a program

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.triton_impl.launch import checked_ids, launch, rows_contiguous, tile_for


@triton.jit
def copy_rows(source, target, read, written, D, BLOCK_D: tl.constexpr):
    """Copy the rows of D values that start at `source` [T, 1] to `target`; a row that is not `read` is zeros."""
    for start in range(0, D, BLOCK_D):
        column = (start + tl.arange(0, BLOCK_D))[None, :]
        x = tl.load(source + column, mask=read & (column < D), other=0.0)
        tl.store(target + column, x.to(target.dtype.element_ty), mask=written & (column < D))


@triton.jit
def copy_prefix(prefix_ptr, target_ptr, P, D, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy the P shared rows to the first rows of one image."""
    for start in range(0, P, TOKENS):
        row = (start + tl.arange(0, TOKENS))[:, None]
        copy_rows(prefix_ptr + row * D, target_ptr + row * D, row < P, row < P, D, BLOCK_D)


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
    image, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    target_ptr = out_ptr + image * (P + K) * D
    if tile == 0:
        copy_prefix(prefix_ptr, target_ptr, P, D, TOKENS, BLOCK_D)
    row = tile * TOKENS + tl.arange(0, TOKENS)
    valid = (row < K)[:, None]
    index = tl.load(ids_ptr + image * K + row, mask=row < K, other=0)
    source = tokens_ptr + (image * stride_b + index * stride_l)[:, None]
    copy_rows(source, target_ptr + ((P + row) * D)[:, None], valid, valid, D, BLOCK_D)


@triton.jit
def position_of(value, list_ptr, length, CHUNK: tl.constexpr):
    """Find the place of each `value` [T], 0 or more, in a list of distinct indices in memory; -1 where it has none."""
    position = tl.full([value.shape[0], CHUNK], -1, tl.int32)
    for start in range(0, length, CHUNK):
        place = start + tl.arange(0, CHUNK)
        entry = tl.load(list_ptr + place, mask=place < length, other=-1).to(tl.int32)
        position = tl.where(value[:, None] == entry[None, :], place[None, :], position)
    return tl.max(position, 1)


@triton.jit(do_not_specialize=["L", "K", "P", "tiles"])
def ccmim_scatter_tokens_kernel(
    grad_ptr,  # [B, P + K, D] float, contiguous
    ids_ptr,  # [B, K] int64
    out_ptr,  # [B, L, D] as grad, out
    L,
    K,
    P,
    tiles,
    D,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the gradient of a gather: each row once, zeros where nothing was taken. Moves B * (K + L) * D values."""
    image, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row = tile * TOKENS + tl.arange(0, TOKENS)
    position = position_of(row, ids_ptr + image * K, K, 32)
    written = (row < L)[:, None]
    source = grad_ptr + image * (P + K) * D + ((P + position) * D)[:, None]
    copy_rows(
        source, out_ptr + image * L * D + (row * D)[:, None], written & (position >= 0)[:, None], written, D, BLOCK_D
    )


def gather_tokens(tokens_BLD: Tensor, ids_BK: Tensor, prefix_PD: Tensor | None) -> Tensor:
    """Launch the kernel of `gather_tokens`."""
    B, L, D = tokens_BLD.shape
    K, P = ids_BK.shape[1], 0 if prefix_PD is None else len(prefix_PD)
    tokens_BLD = rows_contiguous(tokens_BLD)
    out_BTD = torch.empty(B, P + K, D, dtype=tokens_BLD.dtype, device=tokens_BLD.device)
    tile = tile_for(D)
    # Without rows too, the prefix is written.
    tiles = max(1, triton.cdiv(K, tile["TOKENS"]))
    ids_BK = checked_ids(ids_BK, L)
    tensors = (tokens_BLD, ids_BK, out_BTD if prefix_PD is None else prefix_PD.contiguous(), out_BTD)
    strides = tokens_BLD.stride()[:2]
    launch(ccmim_gather_tokens_kernel, B * tiles, *tensors, K, P, tiles, D, *strides, **tile)
    return out_BTD


def scatter_tokens(grad_BTD: Tensor, ids_BK: Tensor, rows: int) -> Tensor:
    """Launch the kernel that takes [B, P + K, D] to [B, rows, D]."""
    B, T, D = grad_BTD.shape
    K = ids_BK.shape[1]
    out_BLD = torch.empty(B, rows, D, dtype=grad_BTD.dtype, device=grad_BTD.device)
    tile = tile_for(D)
    tiles = triton.cdiv(rows, tile["TOKENS"])
    tensors = (grad_BTD.contiguous(), ids_BK.contiguous(), out_BLD)
    launch(ccmim_scatter_tokens_kernel, B * tiles, *tensors, rows, K, T - K, tiles, D, **tile)
    return out_BLD
