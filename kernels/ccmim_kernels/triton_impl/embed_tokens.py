"""This kernel of `embed_tokens` adds positions, and scores each token while it is in registers.

Instructions take 32 % of the time of the bytes on an H200 (benchmarks/results/2026-11-30-audit-after-tokens.md):
a token's values are added, centred, squared and multiplied in registers, 15 instructions each, 20 warps at a time.
"""

# B batch, L patches, D width

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.triton_impl.launch import fitting, launch, rows_contiguous

# Images whose rows a program takes one after another: what it computes of its rows' places serves all of them.
IMAGES = 4


@triton.jit
def sum_of_token(x, PIECES: tl.constexpr, TOKENS: tl.constexpr):
    """Sum the pieces of each token."""
    return tl.sum(tl.sum(x.reshape([PIECES, TOKENS, x.shape[1]]), 0), 1)


@triton.jit(do_not_specialize=["B", "L", "groups"])
def ccmim_embed_tokens_kernel(
    projected_ptr,  # [B, L, D] float, rows contiguous
    positions_ptr,  # [L, D] float
    direction_ptr,  # [D] fp32
    tokens_ptr,  # [B, L, D] float, out
    logits_ptr,  # [B, L] fp32, out
    B,
    L,
    groups,
    eps,
    stride_b,
    stride_l,
    D: tl.constexpr,
    IMAGES: tl.constexpr,
    TOKENS: tl.constexpr,
    PIECES: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Embed and score a tile of rows of a few images, a warp each row. Replaces: add, layer_norm, matmul.

    Moves B * L * D values in and as many out. Positions and direction come from the caches: programs that run at a time
    take the same rows of different images.

    A tile is [PIECES * TOKENS, LANES * VECTOR], each row a piece of a token: of each piece of its token a thread has
    VECTOR neighbours, 16 bytes. The width is a constant, by which the compiler drops pieces past the end of a token.
    """
    tile, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    token = tile * TOKENS + tl.arange(0, TOKENS)
    piece = tl.arange(0, PIECES * TOKENS)[:, None]
    row = tile * TOKENS + piece % TOKENS
    lane = tl.max_contiguous(tl.arange(0, LANES * VECTOR), VECTOR)[None, :]
    column = piece // TOKENS * (LANES * VECTOR) + lane
    inside = (row < L) & (column < D)
    offset = row * D + column
    first = group.to(tl.int64) * IMAGES
    projected_ptr += first * stride_b
    tokens_ptr += first * L * D
    logits_ptr += first * L
    for _ in range(tl.minimum(IMAGES, B - group * IMAGES)):
        x = tl.load(projected_ptr + row.to(tl.int64) * stride_l + column, mask=inside, other=0.0)
        position = tl.load(positions_ptr + offset, mask=inside, other=0.0)
        x = (x.to(tl.float32) + position.to(tl.float32)).to(tokens_ptr.dtype.element_ty)
        tl.store(tokens_ptr + offset, x, mask=inside)
        # Scores are those of the token as it is stored.
        x = x.to(tl.float32)
        # Exactly rounded: where the sum is exact the mean is, and LN of equal values is zero.
        mean = tl.div_rn(sum_of_token(x, PIECES, TOKENS), D * 1.0)
        mean = tl.broadcast_to(mean[None, :], [PIECES, TOKENS]).reshape([PIECES * TOKENS])
        x = tl.where(column < D, x - mean[:, None], 0.0)
        # An address for each row, though all are the same: else the tile would change its threads to meet `direction`.
        direction = tl.load(direction_ptr + row * 0 + column, mask=inside, other=0.0)
        variance = sum_of_token(x * x, PIECES, TOKENS) / D
        product = sum_of_token(x * direction, PIECES, TOKENS)
        tl.store(logits_ptr + token, tl.div_rn(product, tl.sqrt_rn(variance + eps)), mask=token < L)
        projected_ptr += stride_b
        tokens_ptr += L * D
        logits_ptr += L


def embed_tokens(projected_BLD: Tensor, positions_LD: Tensor, direction_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch the kernel; return tokens and logits."""
    B, L, D = projected_BLD.shape
    projected_BLD = rows_contiguous(projected_BLD)
    dtype = torch.promote_types(projected_BLD.dtype, positions_LD.dtype)
    tokens_BLD = torch.empty(B, L, D, dtype=dtype, device=projected_BLD.device)
    logits_BL = torch.empty(B, L, dtype=torch.float32, device=projected_BLD.device)
    fitting((2048,), D, "width")
    # Rows that are no multiple of 16 values are read value by value.
    vector = 16 // dtype.itemsize if D % 16 == 0 else 1
    pieces = triton.next_power_of_2(triton.cdiv(D, 32 * vector))
    tile = {"D": D, "IMAGES": IMAGES, "TOKENS": 4, "PIECES": pieces, "LANES": 32, "VECTOR": vector}
    groups, tiles = triton.cdiv(B, IMAGES), triton.cdiv(L, tile["TOKENS"])
    tensors = (projected_BLD, positions_LD.contiguous(), direction_D.contiguous(), tokens_BLD, logits_BL)
    numbers = (B, L, groups, float(eps), *projected_BLD.stride()[:2])
    launch(ccmim_embed_tokens_kernel, groups * tiles, *tensors, *numbers, **tile, warps=4, fp_fusion=True)
    return tokens_BLD, logits_BL
