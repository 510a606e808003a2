"""This kernel of `divide_tokens` scores, samples and gathers in one launch."""

# B batch, L patches, K visible, M masked, P prefix tokens, D width

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.philox import STREAM_MASK
from ccmim_kernels.sample_partition import empty_partition
from ccmim_kernels.triton_impl.gather_tokens import copy_prefix
from ccmim_kernels.triton_impl.launch import ROW_SIZES, fitting, launch, rows_contiguous, tile_for
from ccmim_kernels.triton_impl.sample_partition import importance_keys, key_options, select_largest, store_partition


@triton.jit
def folded_logits(rows_ptr, offset, valid, direction_ptr, eps, D, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return LN(x) . v of TOKENS rows, read once: mean, squares and product are merged over columns (Chan et al.)."""
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
        merged = mean + step * share
        squares += tl.sum(x * x, 1) + step * step * (start * share)
        product += (mean - merged) * v_sum + tl.sum(x * v[None, :], 1) + (mean_new - merged) * v_new
        mean, v_sum = merged, v_sum + v_new
    return tl.div_rn(product, tl.sqrt_rn(squares / D + eps))


@triton.jit
def store_logits(
    tokens_ptr, direction_ptr, logits_ptr, L, eps, D, stride_l, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write the logits of one image; all threads of its program may read them afterwards."""
    for start in range(0, L, TOKENS):
        row = start + tl.arange(0, TOKENS)
        logits = folded_logits(tokens_ptr, row.to(tl.int64) * stride_l, row < L, direction_ptr, eps, D, TOKENS, BLOCK_D)
        tl.store(logits_ptr + row, logits, mask=row < L)
    tl.debug_barrier()


@triton.jit
def move_rows(
    tokens_ptr,
    restore_ptr,
    visible_ptr,
    masked_ptr,
    L,
    keep,
    P,
    with_masked,
    D,
    stride_l,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy each token of one image, read once, to its row of the visible or of the masked set."""
    for start in range(0, L, TOKENS):
        row = start + tl.arange(0, TOKENS)
        place = tl.load(restore_ptr + row, mask=row < L, other=0)
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


@triton.jit(do_not_specialize=["L", "keep", "P", "scored", "has_logits", "with_masked", "seed", "stream"])
def ccmim_divide_tokens_kernel(
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
    """Treat one image: compute its logits and its partition, and move its rows to where they belong.

    Replaces: layer_norm, matmul, noise, argsort, scatter, two argsorts, two gathers, two expands, two cats. Moves
    B * L * D values in and B * (2 P + L) * D out, the tokens a second time from the L2 cache (one image is 300 kB at
    ViT-B). Keys do not need the softmax itself: its denominator is the same for all patches of an image.
    """
    image = tl.program_id(0).to(tl.int64)
    tokens_ptr += image * stride_b
    if scored != 0:
        store_logits(tokens_ptr, direction_ptr, logits_ptr + image * L, L, eps, D, stride_l, TOKENS, BLOCK_D)
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
    # What other threads of this program stored is read below.
    tl.debug_barrier()

    visible_ptr += image * (P + keep) * D
    masked_ptr += image * (P + L - keep) * D
    copy_prefix(prefix_ptr, visible_ptr, P, D, BLOCK_D)
    if with_masked != 0:
        copy_prefix(prefix_ptr, masked_ptr, P, D, BLOCK_D)
    restore_ptr += image * L
    move_rows(tokens_ptr, restore_ptr, visible_ptr, masked_ptr, L, keep, P, with_masked, D, stride_l, TOKENS, BLOCK_D)


def divide_tokens(
    tokens_BLD: Tensor,
    prefix_PD: Tensor,
    ids_B: Tensor,
    logits_BL: Tensor | None,
    direction_D: Tensor | None,
    eps: float,
    with_masked: bool,
    keep: int,
    seed: int,
    epochs_B: Tensor,
    strategy: str,
    noise: str,
    temperature: float,
) -> tuple[Tensor, ...]:
    """Launch the kernel; return both sets, logits (empty unless computed), and the five tensors of a `Partition`."""
    B, L, D = tokens_BLD.shape
    P, dtype, device = len(prefix_PD), tokens_BLD.dtype, tokens_BLD.device
    scored, size = direction_D is not None, fitting(ROW_SIZES, L, "patches")
    tokens_BLD = rows_contiguous(tokens_BLD)
    visible_BTD = torch.empty(B, P + keep, D, dtype=dtype, device=device)
    masked_BTD = torch.empty((B, P + L - keep, D) if with_masked else 0, dtype=dtype, device=device)
    out_BL = torch.empty((B, L) if scored else 0, dtype=torch.float32, device=device)
    partition = empty_partition(ids_B, L, keep, torch.uint8)
    scores = (direction_D.contiguous() if scored else out_BL, out_BL if logits_BL is None else logits_BL.contiguous())
    samples = (ids_B.contiguous(), epochs_B)
    tensors = (tokens_BLD, prefix_PD.contiguous(), *scores, *samples, visible_BTD, masked_BTD, *partition)
    seed, terms = key_options(strategy, noise, temperature, seed)
    numbers = (L, keep, P, int(scored), int(scored or logits_BL is not None), int(with_masked), seed, STREAM_MASK)
    # Of more than 256 patches, 8 warps would hold too many keys each.
    tile = {**tile_for(D), "BLOCK_L": size, "warps": 8 if size == 256 else 16}
    strides = tokens_BLD.stride()[:2]
    launch(ccmim_divide_tokens_kernel, B, *tensors, *numbers, *terms, float(eps), D, *strides, **tile)
    flags = (flag.view(torch.bool) for flag in partition[3:])
    return visible_BTD, masked_BTD, out_BL, *partition[:3], *flags
