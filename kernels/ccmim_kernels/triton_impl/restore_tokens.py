"""These kernels of `restore_tokens` un-shuffle, fill in the mask token and add positions in one pass, and back.

Instructions take 45 % of the time of the bytes on an H200, those of the gradients 42 %
(benchmarks/results/2026-11-30-audit-after-tokens.md):
each value is converted, selected and added.
"""

# B batch, L patches, K visible, T = 1 + K, S = 1 + L, D width

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.triton_impl.launch import checked_ids, launch, rows_contiguous, tile_for

# Images whose rows a program fills one after another, with one reading of their positions.
IMAGES = 8


@triton.jit(do_not_specialize=["B", "L", "K", "tiles", "blocks"])
def ccmim_restore_tokens_kernel(
    visible_ptr,  # [B, T, D] float, rows contiguous
    mask_token_ptr,  # [D] float
    restore_ptr,  # [B, L] int64
    positions_ptr,  # [S, D] float
    out_ptr,  # [B, S, D] as visible, out
    B,
    L,
    K,
    tiles,
    blocks,
    D,
    stride_b,
    stride_t,
    IMAGES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fill one tile of rows and columns of a few grids. Replaces: expand, two cats, gather, add.

    Moves B * (T + S) * D values. Positions come from the L2 cache, once for IMAGES grids.
    """
    group, tile = tl.program_id(0) // (tiles * blocks), tl.program_id(0) % (tiles * blocks)
    row = (tile // blocks) * TOKENS + tl.arange(0, TOKENS)
    column = ((tile % blocks) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    inside = (row <= L)[:, None] & (column < D)
    offset = (row * D)[:, None] + column
    position = tl.load(positions_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    filler = tl.load(mask_token_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    first = group.to(tl.int64) * IMAGES
    visible_ptr += first * stride_b
    restore_ptr += first * L - 1
    out_ptr += first * (L + 1) * D
    for _ in range(tl.minimum(IMAGES, B - group * IMAGES)):
        # [CLS] has place -1 and is row 0 of the visible tokens.
        place = tl.load(restore_ptr + row, mask=(row > 0) & (row <= L), other=-1)
        seen = (place < K)[:, None]
        x = tl.load(visible_ptr + ((place + 1) * stride_t)[:, None] + column, mask=seen & inside, other=0.0)
        y = tl.where(seen, x.to(tl.float32), filler) + position
        tl.store(out_ptr + offset, y.to(x.dtype), mask=inside)
        visible_ptr += stride_b
        restore_ptr += L
        out_ptr += (L + 1) * D


@triton.jit(do_not_specialize=["L", "K", "blocks"])
def ccmim_restore_tokens_gradients_kernel(
    grad_ptr,  # [B, S, D] float, contiguous
    restore_ptr,  # [B, L] int64
    visible_ptr,  # [B, T, D] as grad, out
    mask_token_ptr,  # [B, D] fp32, out: per image, the sum over its masked rows
    L,
    K,
    blocks,
    D,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Read some columns of one image's gradient once: visible rows are copied to their places, masked ones summed.

    Every row of the visible tokens is one patch's, so each is written once. Moves B * (S + T) * D values.
    """
    image = (tl.program_id(0) // blocks).to(tl.int64)
    column = ((tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    grad_ptr += image * (L + 1) * D
    visible_ptr += image * (K + 1) * D
    total = tl.zeros([TOKENS, BLOCK_D], tl.float32)
    for start in range(0, L + 1, TOKENS):
        row = start + tl.arange(0, TOKENS)
        inside = (row <= L)[:, None] & (column < D)
        x = tl.load(grad_ptr + (row * D)[:, None] + column, mask=inside, other=0.0)
        place = tl.load(restore_ptr + image * L + row - 1, mask=(row > 0) & (row <= L), other=-1)
        seen = (place < K)[:, None]
        tl.store(visible_ptr + ((place + 1) * D)[:, None] + column, x, mask=seen & inside)
        total += tl.where(seen, 0.0, x.to(tl.float32))
    tl.store(mask_token_ptr + image * D + column, tl.sum(total, 0)[None, :], mask=column < D)


def restore_tokens(visible_BTD: Tensor, mask_token_D: Tensor, ids_restore_BL: Tensor, positions_SD: Tensor) -> Tensor:
    """Launch the kernel of `restore_tokens`."""
    B, T, D = visible_BTD.shape
    L = ids_restore_BL.shape[1]
    visible_BTD = rows_contiguous(visible_BTD)
    out_BSD = torch.empty(B, L + 1, D, dtype=visible_BTD.dtype, device=visible_BTD.device)
    tile = tile_for(D)
    tiles, blocks = triton.cdiv(L + 1, tile["TOKENS"]), triton.cdiv(D, tile["BLOCK_D"])
    programs = triton.cdiv(B, IMAGES) * tiles * blocks
    ids_restore_BL = checked_ids(ids_restore_BL, L)
    tensors = (visible_BTD, mask_token_D.contiguous(), ids_restore_BL, positions_SD.contiguous(), out_BSD)
    numbers = (B, L, T - 1, tiles, blocks, D, *visible_BTD.stride()[:2])
    launch(ccmim_restore_tokens_kernel, programs, *tensors, *numbers, IMAGES=IMAGES, **tile)
    return out_BSD


def restore_tokens_gradients(grad_BSD: Tensor, ids_restore_BL: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Launch the kernel of both gradients: [B, 1 + K, D], and [D] float32 by a second sum, without atomics."""
    B, S, D = grad_BSD.shape
    visible_BTD = torch.empty(B, keep + 1, D, dtype=grad_BSD.dtype, device=grad_BSD.device)
    partial_BD = torch.empty(B, D, dtype=torch.float32, device=grad_BSD.device)
    tile = tile_for(D)
    blocks = triton.cdiv(D, tile["BLOCK_D"])
    tensors = (grad_BSD.contiguous(), checked_ids(ids_restore_BL, S - 1), visible_BTD, partial_BD)
    launch(ccmim_restore_tokens_gradients_kernel, B * blocks, *tensors, S - 1, keep, blocks, D, **tile)
    return visible_BTD, partial_BD.sum(0)
