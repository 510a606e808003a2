"""Score, softmax, sample and gather in one launch: the kernel of `divide_tokens`."""

# B batch, L patches, K visible, M masked, P prefix tokens, D width

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.gather_tokens.triton_impl import copy_prefix, rows_contiguous
from ccmim_kernels.launch import launch, row_size, tile_for
from ccmim_kernels.philox import STREAM_MASK
from ccmim_kernels.sample_partition.triton_impl import (
    empty_partition,
    importance_keys,
    noise_weights,
    select_largest,
    signed,
    store_partition,
)


@triton.jit
def folded_logits(rows_ptr, offset, valid, direction_ptr, eps, D, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr):
    """LN(x) . v for TOKENS rows, read once: mean, squared deviations and product, merged over columns (Chan et al.)."""
    mean = tl.zeros([TOKENS], tl.float32)
    squares = tl.zeros([TOKENS], tl.float32)
    product = tl.zeros([TOKENS], tl.float32)  # sum (x - mean) * v
    v_sum = 0.0
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < D
        x = tl.load(rows_ptr + offset[:, None] + column[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        v = tl.load(direction_ptr + column, mask=inside, other=0.0)
        x = x.to(tl.float32)
        count = tl.minimum(D - start, BLOCK_D).to(tl.float32)
        # Exactly rounded: of equal values the mean is the value, and LN is zero.
        mean_new = tl.div_rn(tl.sum(x, 1), count)
        x = tl.where(inside[None, :], x - mean_new[:, None], 0.0)
        v_new = tl.sum(v, 0)
        seen = start + count
        step = mean_new - mean
        share = tl.div_rn(count, seen)
        together = mean + step * share
        squares += tl.sum(x * x, 1) + step * step * (start * share)
        product += (mean - together) * v_sum + tl.sum(x * v[None, :], 1) + (mean_new - together) * v_new
        mean, v_sum = together, v_sum + v_new
    return tl.div_rn(product, tl.sqrt_rn(squares / D + eps))


@triton.jit(do_not_specialize=["L", "keep", "P", "scored", "has_logits", "with_masked", "seed", "stream"])
def divide_tokens_kernel(
    tokens_ptr,  # [B, L, D] float, rows contiguous
    prefix_ptr,  # [P, D] float
    direction_ptr,  # [D] fp32; read where scored
    logits_ptr,  # [B, L] fp32; out where scored, else in, not read where has_logits = 0
    ids_ptr,  # [B] int64 sample ids
    epochs_ptr,  # [B] int64
    visible_ptr,  # [B, P + K, D] as tokens, out
    masked_ptr,  # [B, P + M, D] as tokens, out; not written where with_masked = 0
    ids_visible_ptr,  # [B, K] int64, out
    ids_masked_ptr,  # [B, M] int64, out
    restore_ptr,  # [B, L] int64, out
    mask_ptr,  # [B, L] uint8, out
    nan_ptr,  # [B] uint8, out: 1 where a key is NaN
    L,
    keep,
    P,
    scored,
    has_logits,
    with_masked,
    seed,
    stream,
    inverse_temperature,
    gumbel_weight,
    uniform_weight,
    eps,
    D,
    stride_b,
    stride_l,
    BLOCK_L: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per image: its logits, its partition, its rows to where they belong.

    Replaces: layer_norm, matmul, noise, argsort, scatter, two argsorts, two gathers, two expands, two cats. Moves
    B * L * D values in and B * (2 P + L) * D out, the tokens a second time from the L2 cache (one image is 300 kB at
    ViT-B). Keys do not need the softmax itself: its denominator is the same for all patches of an image.
    """
    image = tl.program_id(0).to(tl.int64)
    tokens_ptr += image * stride_b
    if scored != 0:
        for start in range(0, L, TOKENS):
            row = start + tl.arange(0, TOKENS)
            offset = row.to(tl.int64) * stride_l
            logits = folded_logits(tokens_ptr, offset, row < L, direction_ptr, eps, D, TOKENS, BLOCK_D)
            tl.store(logits_ptr + image * L + row, logits, mask=row < L)
        # What other threads of this program stored is read below.
        tl.debug_barrier()

    patch = tl.arange(0, BLOCK_L)
    valid = patch < L
    logits = tl.load(logits_ptr + image * L + patch, mask=patch < L * has_logits, other=0.0)
    sample = tl.load(ids_ptr + image)
    epoch = tl.load(epochs_ptr + image).to(tl.int32)
    keys = importance_keys(
        logits, patch, sample, seed, stream, epoch, inverse_temperature, gumbel_weight, uniform_weight
    )
    masked = select_largest(keys, valid, L - keep)
    store_partition(masked, patch, valid, image, L, keep, ids_visible_ptr, ids_masked_ptr, restore_ptr, mask_ptr)
    tl.store(nan_ptr + image, tl.max((valid & (keys != keys)).to(tl.int32)).to(tl.uint8))
    tl.debug_barrier()

    visible_ptr += image * (P + keep) * D
    masked_ptr += image * (P + L - keep) * D
    copy_prefix(prefix_ptr, visible_ptr, P, D, BLOCK_D)
    if with_masked != 0:
        copy_prefix(prefix_ptr, masked_ptr, P, D, BLOCK_D)
    for start in range(0, L, TOKENS):
        row = start + tl.arange(0, TOKENS)
        place = tl.load(restore_ptr + image * L + row, mask=row < L, other=0)
        # Both targets are within one image, 32 bits suffice.
        place = place.to(tl.int32)
        seen = (row < L) & (place < keep)
        hidden = (row < L * with_masked) & (place >= keep)
        source = tokens_ptr + (row.to(tl.int64) * stride_l)[:, None]
        to_visible = visible_ptr + ((P + place) * D)[:, None]
        to_masked = masked_ptr + ((P + place - keep) * D)[:, None]
        for column_start in range(0, D, BLOCK_D):
            column = (column_start + tl.arange(0, BLOCK_D))[None, :]
            x = tl.load(source + column, mask=(seen | hidden)[:, None] & (column < D), other=0.0)
            tl.store(to_visible + column, x, mask=seen[:, None] & (column < D))
            tl.store(to_masked + column, x, mask=hidden[:, None] & (column < D))


def divide_tokens(
    tokens_BLD: Tensor,
    prefix_PD: Tensor,
    ids_B: Tensor,
    logits_BL: Tensor | None,
    direction_D: Tensor | None,
    *,
    eps: float,
    with_masked: bool,
    keep: int,
    seed: int,
    epochs_B: Tensor,
    strategy: str,
    noise: str,
    temperature: float,
) -> tuple[Tensor, ...]:
    """Launch the kernel: visible, masked (empty without), logits (empty unless computed), and the partition's five."""
    B, L, D = tokens_BLD.shape
    P, dtype, device = len(prefix_PD), tokens_BLD.dtype, tokens_BLD.device
    scored, size = direction_D is not None, row_size(L, "patches")
    tokens_BLD, ids_B = rows_contiguous(tokens_BLD), ids_B.contiguous()
    visible_BTD = torch.empty(B, P + keep, D, dtype=dtype, device=device)
    masked_BTD = torch.empty((B, P + L - keep, D) if with_masked else 0, dtype=dtype, device=device)
    out_BL = torch.empty((B, L) if scored else 0, dtype=torch.float32, device=device)
    partition = empty_partition(B, L, keep, device)
    launch(
        divide_tokens_kernel,
        B,
        tokens_BLD,
        prefix_PD.contiguous(),
        direction_D.contiguous() if scored else out_BL,
        out_BL if logits_BL is None else logits_BL.contiguous(),
        ids_B,
        epochs_B,
        visible_BTD,
        masked_BTD,
        *partition,
        L,
        keep,
        P,
        int(scored),
        int(scored or logits_BL is not None),
        int(with_masked),
        signed(seed),
        STREAM_MASK,
        1.0 if strategy == "random" else 1.0 / temperature,
        *noise_weights(strategy, noise),
        float(eps),
        D,
        *tokens_BLD.stride()[:2],
        BLOCK_L=size,
        # Of more than 256 patches, 8 warps would hold too many keys each.
        **tile_for(D) | {"warps": 8 if size == 256 else 16},
    )
    flags = (flag.view(torch.bool) for flag in partition[3:])
    return visible_BTD, masked_BTD, out_BL, *partition[:3], *flags
