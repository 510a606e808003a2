"""This kernel of `divide_tokens` reads each token once and writes it to its place in one of both sets.

Instructions take 34 % of the time of the bytes on an H200 (benchmarks/results/2026-11-30-audit-after-tokens.md):
16 bytes a thread and load, stores to two places of which one is left out.
"""

# B batch, L patches, K visible, M masked, P prefix tokens, D width

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.triton_impl.gather_tokens import copy_prefix
from ccmim_kernels.triton_impl.launch import launch, rows_contiguous, tile_for


@triton.jit(do_not_specialize=["L", "K", "P", "with_masked", "tiles"])
def ccmim_divide_tokens_kernel(
    tokens_ptr,  # [B, L, D] float, rows contiguous
    prefix_ptr,  # [P, D] float
    restore_ptr,  # [B, L] int64
    visible_ptr,  # [B, P + K, D] as tokens, out
    masked_ptr,  # [B, P + M, D] as tokens, out where with_masked
    L,
    K,
    P,
    with_masked,
    tiles,
    D,
    stride_b,
    stride_l,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Move one tile of tokens of one image. Replaces: two gathers, two expands, two cats.

    Moves B * L * D values in and B * (2 P + L) * D out.
    """
    image, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    visible_ptr += image * (P + K) * D
    masked_ptr += image * (P + L - K) * D
    if tile == 0:
        copy_prefix(prefix_ptr, visible_ptr, P, D, TOKENS, BLOCK_D)
        copy_prefix(prefix_ptr, masked_ptr, P * with_masked, D, TOKENS, BLOCK_D)
    row = tile * TOKENS + tl.arange(0, TOKENS)
    # Both targets are within one image, 32 bits suffice.
    place = tl.load(restore_ptr + image * L + row, mask=row < L, other=0).to(tl.int32)
    seen = ((row < L) & (place < K))[:, None]
    hidden = ((row < L * with_masked) & (place >= K))[:, None]
    source = tokens_ptr + (image * stride_b + row.to(tl.int64) * stride_l)[:, None]
    to_visible = visible_ptr + ((P + place) * D)[:, None]
    to_masked = masked_ptr + ((P + place - K) * D)[:, None]
    for start in range(0, D, BLOCK_D):
        column = (start + tl.arange(0, BLOCK_D))[None, :]
        x = tl.load(source + column, mask=(seen | hidden) & (column < D), other=0.0)
        tl.store(to_visible + column, x, mask=seen & (column < D))
        tl.store(to_masked + column, x, mask=hidden & (column < D))


def divide_tokens(
    tokens_BLD: Tensor, prefix_PD: Tensor, ids_visible_BK: Tensor, ids_restore_BL: Tensor, with_masked: bool
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; the masked set is empty unless asked for."""
    B, L, D = tokens_BLD.shape
    P, K = len(prefix_PD), ids_visible_BK.shape[1]
    tokens_BLD = rows_contiguous(tokens_BLD)
    visible_BTD = torch.empty(B, P + K, D, dtype=tokens_BLD.dtype, device=tokens_BLD.device)
    masked_BTD = torch.empty((B, P + L - K, D) if with_masked else 0, dtype=tokens_BLD.dtype, device=tokens_BLD.device)
    tile = tile_for(D)
    tiles = triton.cdiv(L, tile["TOKENS"])
    tensors = (tokens_BLD, prefix_PD.contiguous(), ids_restore_BL.contiguous(), visible_BTD, masked_BTD)
    numbers = (L, K, P, int(with_masked), tiles, D, *tokens_BLD.stride()[:2])
    launch(ccmim_divide_tokens_kernel, B * tiles, *tensors, *numbers, **tile)
    return visible_BTD, masked_BTD
