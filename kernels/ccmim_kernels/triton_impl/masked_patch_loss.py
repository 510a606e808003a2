"""This kernel of `masked_patch_loss` computes the loss and its gradient in one pass over the data."""

# B batch, H height, W width, C channels, L patches, M masked, P patch * patch * C, T patches of a program

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.masked_patch_loss import NORM_PIX_EPS
from ccmim_kernels.triton_impl.launch import launch

# 8 entries a thread: 16 bytes of a half-precision prediction. With 16 the kernel needs up to 250 registers, and spills
# on sm_80 with Triton 3.6. P is walked in steps of BLOCK_P, so that a patch may be of any size. Not measured yet.
_PATCHES, _BLOCK_P, _WARPS = 4, 256, 4

# `run`, the bytes of a patch's row, is specialised on: where it is a multiple of 16, so are all the offsets of a tile.
_INTEGERS = ["masked", "patch", "channels", "rows", "columns", "tiles"]
_NORM_PIX_EPS = tl.constexpr(NORM_PIX_EPS)


@triton.jit
def load_pixels(patch_ptr, p, inside, mean_ptr, std_ptr, run, row_bytes, channels, NORM_PIX: tl.constexpr):
    """Return (u / 255 - mean) / std [T, BLOCK_P] fp32 of entries `p` of T patches with corners at `patch_ptr` [T]."""
    channel = p % channels
    mean = tl.load(mean_ptr + channel)[None, :]
    std = tl.load(std_ptr + channel)[None, :]
    # Not by channel and column: from these two Triton sees which pixels lie side by side.
    offset = p // run * row_bytes + p % run
    u = tl.load(patch_ptr[:, None] + offset[None, :], mask=inside, other=0).to(tl.float32)
    if NORM_PIX:
        # Normalising takes out again what the factor's rounding does to all pixels alike.
        return (u - 255 * mean) * (1.0 / (255 * std))
    return tl.div_rn(tl.div_rn(u, 255.0) - mean, std)


@triton.jit
def statistics(patch_ptr, entry, length, valid, mean_ptr, std_ptr, run, row_bytes, channels, BLOCK_P: tl.constexpr):
    """Return first pixel, mean less the first pixel, and 1 / deviation of T patches, each [T, 1] fp32."""
    # Relative to the first pixel a constant patch is exactly zero, whatever the sums round to.
    first = load_pixels(patch_ptr, tl.arange(0, 1), valid[:, None], mean_ptr, std_ptr, run, row_bytes, channels, True)
    mean = tl.zeros(valid.shape, tl.float32)
    squares = tl.zeros(valid.shape, tl.float32)
    for start in range(0, length, BLOCK_P):
        p = start + entry
        inside = valid[:, None] & (p < length)[None, :]
        x = load_pixels(patch_ptr, p, inside, mean_ptr, std_ptr, run, row_bytes, channels, True) - first
        count = tl.minimum(length - start, BLOCK_P).to(tl.float32)
        chunk_mean = tl.sum(tl.where(inside, x, 0.0), 1) / count
        deviation = tl.where(inside, x - chunk_mean[:, None], 0.0)
        # Chan et al.: mean and squared deviations of two parts give those of the whole, without cancellation.
        delta = chunk_mean - mean
        share = count / (start + count)
        mean += delta * share
        squares += tl.sum(deviation * deviation, 1) + delta * delta * share * start
    deviation = tl.sqrt_rn(tl.div_rn(squares, (length - 1).to(tl.float32)) + _NORM_PIX_EPS)
    return first, mean[:, None], tl.div_rn(1.0, deviation)[:, None]


@triton.jit(do_not_specialize=_INTEGERS)
def ccmim_masked_patch_loss_kernel(
    pred_ptr,  # [B, M, P] fp32, fp16 or bf16
    images_ptr,  # [B, H, W, C] uint8
    ids_ptr,  # [B, M] int64
    mean_ptr,  # [C] fp32
    std_ptr,  # [C] fp32
    residual_ptr,  # [B, M, P] as pred, out: prediction - target
    partial_ptr,  # [B * tiles] fp32, out: sum of a program's squared residuals
    masked,
    patch,
    channels,
    rows,
    columns,
    run,
    tiles,
    NORM_PIX: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compare one tile of masked patches of one image with its pixels.

    Replaces: patchify, gather, normalise, mean, variance, difference, square, mean, and the gradient's pass over both.
    Moves P * (1 + 2 * size of pred's dtype) bytes per patch; the second reading of the pixels is served by the cache.
    """
    program = tl.program_id(0).to(tl.int64)
    image = program // tiles
    m = (program % tiles) * PATCHES + tl.arange(0, PATCHES)
    valid = m < masked
    index = tl.load(ids_ptr + image * masked + m, mask=valid, other=0).to(tl.int32)
    row_bytes = columns * run
    length = patch * run
    corner = index // columns * patch * row_bytes + index % columns * run
    patch_ptr = images_ptr + image * rows * patch * row_bytes + corner
    entry = tl.arange(0, BLOCK_P)

    if NORM_PIX:
        first, mean, scale = statistics(
            patch_ptr, entry, length, valid, mean_ptr, std_ptr, run, row_bytes, channels, BLOCK_P
        )
    total = tl.zeros([PATCHES, BLOCK_P], tl.float32)
    out = (image * masked + m) * length
    for start in range(0, length, BLOCK_P):
        p = start + entry
        inside = valid[:, None] & (p < length)[None, :]
        target = load_pixels(patch_ptr, p, inside, mean_ptr, std_ptr, run, row_bytes, channels, NORM_PIX)
        if NORM_PIX:
            target = (target - first - mean) * scale
        offset = out[:, None] + p[None, :]
        pred = tl.load(pred_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        residual = tl.where(inside, pred - target, 0.0)
        tl.store(residual_ptr + offset, residual.to(residual_ptr.dtype.element_ty), mask=inside)
        total += residual * residual
    tl.store(partial_ptr + program, tl.sum(tl.sum(total, 1), 0))


def masked_patch_loss(
    pred_BMP: Tensor, images_BHWC: Tensor, ids_BM: Tensor, patch: int, mean_C: Tensor, std_C: Tensor, norm_pix: bool
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; return the loss, a float32 scalar, and prediction - target [B, M, P] as the prediction."""
    B, M = ids_BM.shape
    _, H, W, C = images_BHWC.shape
    tiles = triton.cdiv(M, _PATCHES)
    pred_BMP = pred_BMP.contiguous()
    residual_BMP = torch.empty_like(pred_BMP)
    partial = torch.empty(B * tiles, dtype=torch.float32, device=pred_BMP.device)
    scales = (x.float().contiguous() for x in (mean_C, std_C))
    tensors = (pred_BMP, images_BHWC.contiguous(), ids_BM.contiguous(), *scales, residual_BMP, partial)
    sizes = (M, patch, C, H // patch, W // patch, patch * C, tiles)
    options = {"NORM_PIX": norm_pix, "PATCHES": _PATCHES, "BLOCK_P": _BLOCK_P, "warps": _WARPS}
    launch(ccmim_masked_patch_loss_kernel, B * tiles, *tensors, *sizes, **options)
    # In float64 and a fixed order: the sum of many programs is as exact as their parts, and the same in every run.
    return (partial.sum(dtype=torch.float64) / pred_BMP.numel()).float(), residual_BMP
