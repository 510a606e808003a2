"""This kernel of `masked_patch_loss` computes the loss and its gradient in one pass over the data.

A warp holds a whole patch in registers, so each pixel is loaded and converted once. Entry p of a patch, in the order of
memory, is value i of lane s in chunk k: p = (k * LANES + s) * VALUES + i. Tensors have the axes k and
j = s * VALUES + i: of three axes, Triton before 3.9 lets the lanes of a warp lie along the wrong one.
"""

# B batch, H height, W width, C channels, M masked, P patch * patch * C, K chunks, J lanes * values of a lane

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.masked_patch_loss import NORM_PIX_EPS
from ccmim_kernels.triton_impl.launch import MOST_REGISTERS, checked_ids, fitting, launch

# Patches of a program, one after the other: channel statistics and offsets are computed once for all of them.
_PATCHES = 8
# Values of a patch, rounded up; 32 values a lane, so the largest take 16 warps.
_TILES = (256, 512, 1024, 2048, 4096, 8192, 16384)
_INTEGERS = ["masked", "rows", "columns", "tiles"]
_NORM_PIX_EPS = tl.constexpr(NORM_PIX_EPS)


@triton.jit
def channel_scales(
    mean_ptr, std_ptr, CHANNELS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, VALUES: tl.constexpr
):
    """Return a and b [K, J] fp32, by which a * u + b normalises the byte u of each entry by its channel.

    The channel of an entry is (s * VALUES + k * LANES * VALUES + i) % C. The last two terms are known when the kernel
    is compiled, so a lane holds C values and not one for each of its entries.
    """
    lane = tl.arange(0, LANES) * VALUES
    step = (tl.arange(0, CHUNKS) * (LANES * VALUES))[:, None] + (tl.arange(0, LANES * VALUES) & (VALUES - 1))[None, :]
    a = tl.zeros([CHUNKS, LANES * VALUES], tl.float32)
    b = tl.zeros([CHUNKS, LANES * VALUES], tl.float32)
    for q in tl.static_range(CHANNELS):
        channel = (lane + q) % CHANNELS
        std = tl.load(std_ptr + channel)
        mine = step % CHANNELS == q
        a = tl.where(mine, of_lanes(tl.div_rn(1.0, 255 * std), VALUES)[None, :], a)
        b = tl.where(mine, of_lanes(tl.div_rn(-tl.load(mean_ptr + channel), std), VALUES)[None, :], b)
    return a, b


@triton.jit
def of_lanes(x, VALUES: tl.constexpr):
    """Give each of a lane's VALUES the lane's number: [S] becomes [J]."""
    return tl.reshape(tl.broadcast_to(x[:, None], [x.shape[0], VALUES]), [x.shape[0] * VALUES])


@triton.jit
def total_of(x):
    """Sum [K, J] over both axes, that within a lane first."""
    return tl.sum(tl.sum(x, 0), 0)


@triton.jit
def inverse_root(x):
    """Return 1 / sqrt(x) of a normal number to the last bit or two, without the branch that an exact root takes."""
    root = tl.rsqrt(x)
    return root * (1.5 - 0.5 * x * root * root)


@triton.jit(do_not_specialize=_INTEGERS)
def ccmim_masked_patch_loss_kernel(
    pred_ptr,  # [B, M, P] fp32, fp16 or bf16
    images_ptr,  # [B, H, W, C] uint8 or fp32
    ids_ptr,  # [B, M] int64
    mean_ptr,  # [C] fp32
    std_ptr,  # [C] fp32
    residual_ptr,  # [B, M, P] as pred, out: prediction - target
    partial_ptr,  # [B * tiles] fp32, out: sum of a program's squared residuals
    masked,
    rows,
    columns,
    tiles,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    NORM_PIX: tl.constexpr,
    PATCHES: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Compare up to PATCHES masked patches of one image with their pixels.

    Replaces: patchify, gather, normalise, mean, variance, difference, square, mean, and the gradient's pass over both.
    Moves P * (1 + 2 * size of pred's dtype) bytes per patch, each once. By the audit its instructions take 43 % of the
    time of these bytes on an H200, 34 % on an A100 (ViT/16, bfloat16); so no more was done about them.
    """
    RUN: tl.constexpr = PATCH * CHANNELS  # bytes of a patch's row
    LENGTH: tl.constexpr = PATCH * RUN
    program = tl.program_id(0).to(tl.int64)
    image = program // tiles
    start = (program % tiles).to(tl.int32) * PATCHES
    p = (tl.arange(0, CHUNKS) * (LANES * VALUES))[:, None] + tl.arange(0, LANES * VALUES)[None, :]
    inside = p < LENGTH
    row_bytes = columns * RUN
    # A lane loads as many pixels as values of the prediction.
    pixel = tl.max_contiguous(p // RUN * row_bytes + p % RUN, [1, VALUES])
    images_ptr += image * rows * PATCH * row_bytes
    a, b = channel_scales(mean_ptr, std_ptr, CHANNELS, CHUNKS, LANES, VALUES)
    a_first = tl.div_rn(1.0, 255 * tl.load(std_ptr))
    b_first = tl.div_rn(-tl.load(mean_ptr), tl.load(std_ptr))
    total = 0.0
    for m in range(start, tl.minimum(start + PATCHES, masked)):
        index = tl.load(ids_ptr + image * masked + m).to(tl.int32)
        patch_ptr = images_ptr + (index // columns * PATCH * row_bytes + index % columns * RUN)
        entry = (image * masked + m) * LENGTH
        u = tl.load(patch_ptr + pixel, mask=inside, other=0).to(tl.float32)
        pred = tl.load(pred_ptr + entry + p, mask=inside, other=0.0).to(tl.float32)
        if NORM_PIX:
            # Relative to the first pixel a constant patch is exactly zero, whatever the sums round to.
            first = tl.load(patch_ptr).to(tl.float32) * a_first + b_first
            x = tl.where(inside, u * a + b - first, 0.0)
            x = tl.where(inside, x - total_of(x) * (1.0 / LENGTH), 0.0)
            target = x * inverse_root(total_of(x * x) / (LENGTH - 1) + _NORM_PIX_EPS)
        else:
            target = u * a + b
        residual = tl.where(inside, pred - target, 0.0)
        tl.store(residual_ptr + entry + p, residual.to(residual_ptr.dtype.element_ty), mask=inside)
        total += total_of(residual * residual)
    tl.store(partial_ptr + program, total)


def masked_patch_loss(
    pred_BMP: Tensor, images_BHWC: Tensor, ids_BM: Tensor, patch: int, mean_C: Tensor, std_C: Tensor, norm_pix: bool
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; return the loss, a float32 scalar, and prediction - target [B, M, P] as the prediction."""
    B, M = ids_BM.shape
    _, H, W, C = images_BHWC.shape
    tile = fitting(_TILES, patch * patch * C, "patch * patch * channels")
    warps = max(1, tile // 1024)
    # 16 bytes of the prediction; as many pixels are loaded at once.
    values = 16 // pred_BMP.element_size()
    lanes = 32 * warps
    tiles = triton.cdiv(M, _PATCHES)
    pred_BMP = pred_BMP.contiguous()
    residual_BMP = torch.empty_like(pred_BMP)
    partial = torch.empty(B * tiles, dtype=torch.float32, device=pred_BMP.device)
    scales = (x.float().contiguous() for x in (mean_C, std_C))
    ids_BM = checked_ids(ids_BM, (H // patch) * (W // patch))
    tensors = (pred_BMP, images_BHWC.contiguous(), ids_BM, *scales, residual_BMP, partial)
    sizes = (M, H // patch, W // patch, tiles)
    shape = {"CHUNKS": tile // (lanes * values), "LANES": lanes, "VALUES": values}
    # 24 values a lane need no more than lets 32 programs, all there may be, fit on a multiprocessor. Without norm_pix
    # most need fewer, and the others would spill, as float32 pixels would.
    limited = norm_pix and values == 8 and warps == 1 and patch * C % values == 0 and images_BHWC.dtype == torch.uint8
    registers = 64 if limited else MOST_REGISTERS
    options = {"PATCH": patch, "CHANNELS": C, "NORM_PIX": norm_pix, "PATCHES": _PATCHES, **shape}
    compiled = {"warps": warps, "fp_fusion": True, "registers": registers}
    launch(ccmim_masked_patch_loss_kernel, B * tiles, *tensors, *sizes, **options, **compiled)
    # In float64 and a fixed order: the sum of many programs is as exact as their parts, and the same in every run.
    return (partial.sum(dtype=torch.float64) / pred_BMP.numel()).float(), residual_BMP
