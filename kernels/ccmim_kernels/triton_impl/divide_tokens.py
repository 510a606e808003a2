"""This kernel of `divide_tokens` writes both sets, and reads each token of one of them once.

Instructions take 35 % of the time of the bytes on an H200 (`benchmarks/ops/audit.py`): 16 bytes a thread and load,
stores to two places of which one is left out.
"""

# B batch, L patches, K visible, T masked ones that the teacher sees, P prefix tokens, D width

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.triton_impl.gather_tokens import copy_prefix
from ccmim_kernels.triton_impl.launch import launch, rows_contiguous, tile_for


@triton.jit(do_not_specialize=["K", "T", "P", "tiles"])
def ccmim_divide_tokens_kernel(
    tokens_ptr,  # [B, L, D] float, rows contiguous
    prefix_ptr,  # [P, D] float
    ids_visible_ptr,  # [B, K] int64
    ids_teacher_ptr,  # [B, T] int64; not read where T = 0
    visible_ptr,  # [B, P + K, D] as tokens, out
    masked_ptr,  # [B, P + T, D] as tokens, out where T
    K,
    T,
    P,
    tiles,
    D,
    stride_b,
    stride_l,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Move one tile of the rows of both sets of one image. Replaces: two gathers, two expands, two cats.

    Moves B * (K + T) * D values in and B * (2 P + K + T) * D out.
    """
    image, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    visible_ptr += image * (P + K) * D
    masked_ptr += image * (P + T) * D
    if tile == 0:
        copy_prefix(prefix_ptr, visible_ptr, P, D, TOKENS, BLOCK_D)
        copy_prefix(prefix_ptr, masked_ptr, tl.where(T > 0, P, 0), D, TOKENS, BLOCK_D)
    # The teacher's rows follow the visible ones.
    row = tile * TOKENS + tl.arange(0, TOKENS)
    is_visible, is_masked = row < K, (row >= K) & (row < K + T)
    index = tl.load(ids_visible_ptr + image * K + row, mask=is_visible, other=0)
    index += tl.load(ids_teacher_ptr + image * T + row - K, mask=is_masked, other=0)
    is_visible, is_masked = is_visible[:, None], is_masked[:, None]
    source = tokens_ptr + (image * stride_b + index * stride_l)[:, None]
    # Both targets are within one image, 32 bits suffice.
    to_visible = visible_ptr + ((P + row) * D)[:, None]
    to_masked = masked_ptr + ((P + row - K) * D)[:, None]
    for start in range(0, D, BLOCK_D):
        column = (start + tl.arange(0, BLOCK_D))[None, :]
        x = tl.load(source + column, mask=(is_visible | is_masked) & (column < D), other=0.0)
        tl.store(to_visible + column, x, mask=is_visible & (column < D))
        tl.store(to_masked + column, x, mask=is_masked & (column < D))


def divide_tokens(
    tokens_BLD: Tensor, prefix_PD: Tensor, ids_visible_BK: Tensor, ids_teacher_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; the masked set is empty without indices of it."""
    B, _, D = tokens_BLD.shape
    ids_BT = ids_visible_BK[:, :0] if ids_teacher_BT is None else ids_teacher_BT
    K, T, P = ids_visible_BK.shape[1], ids_BT.shape[1], len(prefix_PD)
    tokens_BLD = rows_contiguous(tokens_BLD)
    visible_BTD = torch.empty(B, P + K, D, dtype=tokens_BLD.dtype, device=tokens_BLD.device)
    masked_BTD = torch.empty((B, P + T, D) if T else 0, dtype=tokens_BLD.dtype, device=tokens_BLD.device)
    tile = tile_for(D)
    tiles = triton.cdiv(K + T, tile["TOKENS"])
    inputs = (tokens_BLD, prefix_PD.contiguous(), ids_visible_BK.contiguous(), ids_BT.contiguous())
    numbers = (K, T, P, tiles, D, *tokens_BLD.stride()[:2])
    launch(ccmim_divide_tokens_kernel, B * tiles, *inputs, visible_BTD, masked_BTD, *numbers, **tile)
    return visible_BTD, masked_BTD
