"""These kernels of `restore_tokens` un-shuffle, fill in the mask token and add positions in one pass, and back.

The gradient of the visible tokens is that of a gather, see `scatter_tokens`.
"""

# B batch, L patches, K visible, T = 1 + K, S = 1 + L, D width

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.triton_impl.launch import launch, rows_contiguous, tile_for


@triton.jit(do_not_specialize=["L", "K", "tiles"])
def ccmim_restore_tokens_kernel(
    visible_ptr,  # [B, T, D] float, rows contiguous
    mask_token_ptr,  # [D] float
    restore_ptr,  # [B, L] int64
    positions_ptr,  # [S, D] float
    out_ptr,  # [B, S, D] as visible, out
    L,
    K,
    tiles,
    D,
    stride_b,
    stride_t,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fill one tile of rows of one grid. Replaces: expand, two cats, gather, add. Moves B * (T + S) * D values."""
    program = tl.program_id(0).to(tl.int64)
    image = program // tiles
    row = (program % tiles) * TOKENS + tl.arange(0, TOKENS)
    valid = row <= L
    place = tl.load(restore_ptr + image * L + row - 1, mask=valid & (row > 0), other=-1)
    # [CLS] has place -1 and is row 0 of the visible tokens.
    seen = (valid & (place < K))[:, None]
    source = visible_ptr + (image * stride_b + (place + 1) * stride_t)[:, None]
    target = out_ptr + ((image * (L + 1) + row) * D)[:, None]
    for start in range(0, D, BLOCK_D):
        column = (start + tl.arange(0, BLOCK_D))[None, :]
        inside = valid[:, None] & (column < D)
        x = tl.load(source + column, mask=seen & (column < D), other=0.0)
        filler = tl.load(mask_token_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        position = tl.load(positions_ptr + (row * D)[:, None] + column, mask=inside, other=0.0).to(tl.float32)
        y = tl.where(seen, x.to(tl.float32), filler) + position
        tl.store(target + column, y.to(x.dtype), mask=inside)


@triton.jit(do_not_specialize=["L", "K", "blocks"])
def ccmim_mask_token_gradient_kernel(
    grad_ptr,  # [B, S, D] float, contiguous
    restore_ptr,  # [B, L] int64
    out_ptr,  # [B, D] fp32, out: per image, the sum over its masked rows
    L,
    K,
    blocks,
    D,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum one image's rows of the mask token's gradient, over some columns. Reads B * M * D values."""
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    column = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, L, TOKENS):
        patch = start + tl.arange(0, TOKENS)
        place = tl.load(restore_ptr + image * L + patch, mask=patch < L, other=-1)
        source = grad_ptr + ((image * (L + 1) + 1 + patch) * D)[:, None]
        x = tl.load(source + column[None, :], mask=(place >= K)[:, None] & (column < D)[None, :], other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    tl.store(out_ptr + image * D + column, total, mask=column < D)


def restore_tokens(visible_BTD: Tensor, mask_token_D: Tensor, ids_restore_BL: Tensor, positions_SD: Tensor) -> Tensor:
    """Launch the kernel of `restore_tokens`."""
    B, T, D = visible_BTD.shape
    L = ids_restore_BL.shape[1]
    visible_BTD = rows_contiguous(visible_BTD)
    out_BSD = torch.empty(B, L + 1, D, dtype=visible_BTD.dtype, device=visible_BTD.device)
    tile = tile_for(D)
    tiles = triton.cdiv(L + 1, tile["TOKENS"])
    tensors = (visible_BTD, *(x.contiguous() for x in (mask_token_D, ids_restore_BL, positions_SD)), out_BSD)
    strides = visible_BTD.stride()[:2]
    launch(ccmim_restore_tokens_kernel, B * tiles, *tensors, L, T - 1, tiles, D, *strides, **tile)
    return out_BSD


def restore_tokens_mask_token_gradient(grad_BSD: Tensor, ids_restore_BL: Tensor, keep: int) -> Tensor:
    """Sum [B, 1 + L, D] over all masked positions to [D] float32, in two passes: no atomics, one order."""
    B, S, D = grad_BSD.shape
    partial_BD = torch.empty(B, D, dtype=torch.float32, device=grad_BSD.device)
    tile = tile_for(D)
    blocks = triton.cdiv(D, tile["BLOCK_D"])
    tensors = (grad_BSD.contiguous(), ids_restore_BL.contiguous(), partial_BD)
    launch(ccmim_mask_token_gradient_kernel, B * blocks, *tensors, S - 1, keep, blocks, D, **tile)
    return partial_BD.sum(0)
