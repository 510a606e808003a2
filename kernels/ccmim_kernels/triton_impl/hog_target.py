"""This kernel of `hog_target` computes gradients, votes and histograms of the masked patches alone, in one launch."""

# B batch, H height, W width, C channels, L patches, M masked, Q bins, X pixels of a cell, R histograms of a program

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.hog_target import EPS, boundaries
from ccmim_kernels.triton_impl.launch import fitting, launch

# Histograms of a program, at most: neighbours in memory (channels, then cells side by side), so that a warp's loads of
# 8 pixels of each touch one line or two, and sums over 64 pixels need no shared memory. Not measured yet.
_ROWS = 4
_THREAD = 8  # pixels of histograms a thread; not measured yet
# Pixels of a cell (8, 16, 32 a side) and bins: the smallest of these that suffices.
_CELL_SIZES, _BIN_SIZES = (64, 256, 1024), (16, 64)
_INTEGERS = ["height", "width", "channels", "masked", "patch", "cell", "bins", "tiles"]
_EPS = tl.constexpr(EPS)


@triton.jit
def load_pixel(image_ptr, row, column, inside):
    """Load [X, R] int32 at offset `row` + `column`; zero where not `inside`."""
    return tl.load(image_ptr + (row + column), mask=inside, other=0).to(tl.int32)


@triton.jit
def sobel(image_ptr, y, x, channel, height, width, channels, inside):
    """Return the gradients (along x, along y) [X, R] int32, borders reflected: row -1 is row 1, row H is row H - 2."""
    line = width * channels
    above = tl.where(y == 0, 1, y - 1) * line
    below = tl.where(y == height - 1, height - 2, y + 1) * line
    left = tl.where(x == 0, 1, x - 1) * channels + channel
    right = tl.where(x == width - 1, width - 2, x + 1) * channels + channel
    here_y, here_x = y * line, x * channels + channel
    above_left = load_pixel(image_ptr, above, left, inside)
    above_right = load_pixel(image_ptr, above, right, inside)
    below_left = load_pixel(image_ptr, below, left, inside)
    below_right = load_pixel(image_ptr, below, right, inside)
    dx = load_pixel(image_ptr, here_y, right, inside) - load_pixel(image_ptr, here_y, left, inside)
    dy = load_pixel(image_ptr, below, here_x, inside) - load_pixel(image_ptr, above, here_x, inside)
    falling, rising = below_right - above_left, below_left - above_right
    return falling - rising + 2 * dx, falling + rising + 2 * dy


@triton.jit(do_not_specialize=_INTEGERS)
def ccmim_hog_target_kernel(
    images_ptr,  # [B, H, W, C] uint8
    ids_ptr,  # [B, M] int64
    boundaries_ptr,  # [Q, 2] fp32: (cos, sin) of the angle a bin ends at; the last is not looked at
    out_ptr,  # [B, M, F] fp32, fp16 or bf16, out; F is (cell row, cell column, C, Q)
    height,
    width,
    channels,
    masked,
    patch,
    cell,
    bins,
    tiles,
    ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Compute ROWS of one image's M * (patch / cell)**2 * C histograms.

    Replaces: padding, two Sobel filters over the whole image, atan2, one-hot votes (Q numbers a pixel), sums,
    normalising, patchify, gather. Moves a masked patch's pixels and their border once (the other seven readings are
    served by the cache), and F numbers a patch out.
    """
    program = tl.program_id(0).to(tl.int64)
    image = program // tiles
    row = (program % tiles).to(tl.int32) * ROWS + tl.arange(0, ROWS)
    side = patch // cell
    histograms = side * side * channels
    m = row // histograms
    valid = m < masked
    index = tl.load(ids_ptr + image * masked + m, mask=valid, other=0).to(tl.int32)
    channel = row % channels
    place = row % histograms // channels
    columns = width // patch
    top = index // columns * patch + place // side * cell
    left = index % columns * patch + place % side * cell
    pixel = tl.arange(0, BLOCK_X)
    inside = (pixel < cell * cell)[:, None] & valid[None, :]
    y = top[None, :] + (pixel // cell)[:, None]
    x = left[None, :] + (pixel % cell)[:, None]
    image_ptr = images_ptr + image * height * width * channels
    dx, dy = sobel(image_ptr, y, x, channel[None, :], height, width, channels, inside)

    rest = tl.sqrt_rn((dx * dx + dy * dy).to(tl.float32))
    flipped = (dy < 0) | ((dy == 0) & (dx < 0))
    dx, dy = tl.where(flipped, -dx, dx).to(tl.float32), tl.where(flipped, -dy, dy).to(tl.float32)
    bin_index = tl.arange(0, BLOCK_Q)
    histogram = tl.zeros([BLOCK_Q, ROWS], tl.float32)
    for q in range(bins):
        # Votes that no bin before this one has taken are its own if they lie before the angle it ends at.
        cos, sin = tl.load(boundaries_ptr + 2 * q), tl.load(boundaries_ptr + 2 * q + 1)
        taken = (cos * dy - sin * dx < 0) | (q == bins - 1)
        votes = tl.sum(tl.where(taken, rest, 0.0), 0)
        rest = tl.where(taken, 0.0, rest)
        histogram = tl.where((bin_index == q)[:, None], votes[None, :], histogram)

    length = tl.maximum(tl.sqrt_rn(tl.sum(histogram * histogram, 0)), _EPS)
    histogram = tl.div_rn(histogram, length[None, :])
    offset = (image * masked * histograms + row)[None, :] * bins + bin_index[:, None]
    stored = valid[None, :] & (bin_index < bins)[:, None]
    tl.store(out_ptr + offset, histogram.to(out_ptr.dtype.element_ty), mask=stored)


@functools.cache
def boundaries_on(device: torch.device, bins: int) -> Tensor:
    """Return `boundaries` and (0, 0) on a device, [Q, 2] float32; kept, for a copy would wait for the device."""
    return torch.tensor([*boundaries(bins), (0.0, 0.0)], dtype=torch.float32, device=device)


def hog_target(
    images_BHWC: Tensor, ids_masked_BM: Tensor, patch: int, bins: int, cell: int, dtype: torch.dtype
) -> Tensor:
    """Launch the kernel; return [B, M, F] in `dtype`. Cells have at most 1024 pixels, histograms at most 64 bins."""
    B, M = ids_masked_BM.shape
    _, H, W, C = images_BHWC.shape
    size = fitting(_CELL_SIZES, cell * cell, "cell * cell")
    rows = min(_ROWS, 2048 // size)
    histograms = (patch // cell) ** 2 * C
    tiles = triton.cdiv(M * histograms, rows)
    out_BMF = torch.empty((B, M, histograms * bins), dtype=dtype, device=images_BHWC.device)
    limits = boundaries_on(images_BHWC.device, bins)
    tensors = (images_BHWC.contiguous(), ids_masked_BM.contiguous(), limits, out_BMF)
    block = {"ROWS": rows, "BLOCK_X": size, "BLOCK_Q": fitting(_BIN_SIZES, bins, "bins")}
    warps = size * rows // (32 * _THREAD)
    launch(ccmim_hog_target_kernel, B * tiles, *tensors, H, W, C, M, patch, cell, bins, tiles, **block, warps=warps)
    return out_BMF
