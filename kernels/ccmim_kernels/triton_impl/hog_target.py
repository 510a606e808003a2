"""This kernel of `hog_target` computes gradients, votes and histograms of the masked patches alone, in one launch.

A lane has four pixels of each row of a cell, all their channels, and walks down the rows: it loads each row once, and
keeps of the two before it what the Sobel filters need. Four pixels are C words of four bytes.
"""

# B batch, H height, W width, C channels, M masked, Q bins, S lanes, N cells of a program, V bytes of a word

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.hog_target import EPS, boundaries
from ccmim_kernels.triton_impl.launch import checked_ids, fitting, launch

_LANES = 32  # a program is one warp: nothing is exchanged but the sums of a cell's lanes
_CELLS = (4, 8, 16, 32, 64, 128)  # pixels per side of a cell, rounded up
# Channels * bins, rounded up: a lane adds them up in as many registers.
_FEATURES = (16, 32, 64, 128)
_EPS = tl.constexpr(EPS)


@triton.jit
def load_word(row_ptr, inside, x, width, WORD: tl.constexpr, CHANNELS: tl.constexpr):
    """Load word WORD [S] of the lanes' pixels, which are words 0 to C - 1; none beyond the image."""
    if WORD < 0:
        inside = inside & (x > 0)
    if WORD >= CHANNELS:
        inside = inside & (x + 4 < width)
    return tl.load((row_ptr + 4 * WORD).to(tl.pointer_type(tl.uint32), bitcast=True), mask=inside, other=0)


@triton.jit
def load_bytes(row_ptr, inside, x, width, BYTE: tl.constexpr, CHANNELS: tl.constexpr):
    """Load bytes BYTE to BYTE + 3 [V, S] int32 of the lanes' pixels, made of one or two aligned words."""
    WORD: tl.constexpr = BYTE // 4
    SHIFT: tl.constexpr = BYTE % 4 * 8
    word = load_word(row_ptr, inside, x, width, WORD, CHANNELS)
    if SHIFT > 0:
        word = (word >> SHIFT) | (load_word(row_ptr, inside, x, width, WORD + 1, CHANNELS) << (32 - SHIFT))
    return (word[None, :] >> (8 * tl.arange(0, 4))[:, None] & 255).to(tl.int32)


@triton.jit
def row_filters(
    image_ptr, y, x, inside, height, width, WORD: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr
):
    """Filter word WORD of the lanes' pixels along row `y`: right - left, left + 2 * here + right, each [V, S] int32.

    Borders are reflected: row -1 is row 1, row H is row H - 2, and so for columns.
    """
    y = tl.where(y < 0, 1, y)
    y = tl.where(y >= height, 2 * (height - 1) - y, y)
    row_ptr = image_ptr + (y * width + x) * CHANNELS
    byte = (4 * WORD + tl.arange(0, 4))[:, None]
    pixel = byte // CHANNELS
    if ALIGNED:
        left = load_bytes(row_ptr, inside, x, width, 4 * WORD - CHANNELS, CHANNELS)
        here = load_bytes(row_ptr, inside, x, width, 4 * WORD, CHANNELS)
        right = load_bytes(row_ptr, inside, x, width, 4 * WORD + CHANNELS, CHANNELS)
        last = (pixel == 3) & (x + 4 == width)[None, :]
    else:
        byte_ptr, column = row_ptr[None, :] + byte, x[None, :] + pixel
        loaded = inside[None, :] & (column < width)
        last = column == width - 1
        left = tl.load(byte_ptr - CHANNELS, mask=loaded & (column > 0), other=0).to(tl.int32)
        here = tl.load(byte_ptr, mask=loaded, other=0).to(tl.int32)
        right = tl.load(byte_ptr + CHANNELS, mask=loaded & (column < width - 1), other=0).to(tl.int32)
    beyond = right
    right = tl.where(last, left, right)
    left = tl.where((pixel == 0) & (x == 0)[None, :], beyond, left)
    return right - left, left + 2 * here + right


@triton.jit
def take(x, BYTE: tl.constexpr):
    """Return x[BYTE] [S] of x [V, S] int32; a register, no instruction."""
    return tl.sum(tl.where((tl.arange(0, 4) == BYTE)[:, None], x, 0), 0)


@triton.jit
def add_votes(histogram, a, b, counted, cotangent_ptr, BYTE: tl.constexpr, BINS: tl.constexpr, CHANNELS: tl.constexpr):
    """Add the lengths of gradients (a, b) [S] to the bins of atan2(b, a), in `histogram` [C * Q, S] fp32."""
    FIRST: tl.constexpr = BYTE % CHANNELS * BINS
    a, b = a.to(tl.float32), b.to(tl.float32)
    length = tl.sqrt(a * a + b * b)
    # A line has two directions; that of 0 to 180 degrees is taken: b > 0, or b = 0 and a > 0.
    sign = (b * 4096 + a).to(tl.int32, bitcast=True) & -(2**31)
    a = (a.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    b = tl.abs(b)
    row = tl.arange(0, histogram.shape[0])[:, None]
    reached = counted
    for q in tl.static_range(BINS):
        voting = reached
        if q < BINS - 1:
            # Beyond one angle is beyond all before it.
            reached = reached & (a <= tl.load(cotangent_ptr + q) * b)
            voting = voting & (reached == 0)
        mine = (row == FIRST + q) & voting[None, :]
        histogram = tl.where(mine, histogram + length[None, :], histogram)
    return histogram


@triton.jit
def normalised(
    histogram,
    feature,
    BINS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    CELL_LANES: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Add up [F, LANES] over the lanes of each cell, and divide each channel's histogram by its length."""
    # Each lane of a cell gets the cell's histograms, so that normalising them exchanges nothing.
    by_cell = tl.reshape(histogram, [BLOCK_F, LANES // CELL_LANES, CELL_LANES])
    by_cell = tl.broadcast_to(tl.sum(by_cell, 2)[:, :, None], [BLOCK_F, LANES // CELL_LANES, CELL_LANES])
    histogram = tl.reshape(by_cell, [BLOCK_F, LANES])
    for channel in tl.static_range(CHANNELS):
        mine = feature // BINS == channel
        length = tl.sqrt_rn(tl.sum(tl.where(mine, histogram * histogram, 0.0), 0))
        histogram = tl.where(mine, histogram * tl.div_rn(1.0, tl.maximum(length, _EPS))[None, :], histogram)
    return histogram


@triton.jit(do_not_specialize=["height", "width", "masked", "tiles"])
def ccmim_hog_target_kernel(
    images_ptr,  # [B, H, W, C] uint8
    ids_ptr,  # [B, M] int64
    cotangent_ptr,  # [Q] fp32: of the angles that part the bins; the last is not looked at
    out_ptr,  # [B, M, F] fp32, fp16 or bf16, out; F is (cell row, cell column, C, Q)
    height,
    width,
    masked,
    tiles,
    PATCH: tl.constexpr,
    CELL: tl.constexpr,
    CHANNELS: tl.constexpr,
    BINS: tl.constexpr,
    LANES: tl.constexpr,
    CELL_LANES: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Compute the histograms of some cells of one image's masked patches.

    Replaces: padding, two Sobel filters over the whole image, atan2, one-hot votes (Q numbers a pixel), sums,
    normalising, patchify, gather. Moves a masked patch's pixels and their border once, and F numbers a patch out; a
    word comes from the L1 cache up to three times. Its instructions take longer than its bytes: see `REASONS` in
    benchmarks/ops/audit.py.
    """
    SIDE: tl.constexpr = PATCH // CELL
    CELLS: tl.constexpr = LANES // CELL_LANES
    program = tl.program_id(0).to(tl.int64)
    image = program // tiles
    first = (program % tiles).to(tl.int32) * CELLS
    lane = tl.arange(0, LANES)
    cell, part = first + lane // CELL_LANES, lane % CELL_LANES * 4
    m, place = cell // (SIDE * SIDE), cell % (SIDE * SIDE)
    inside = (m < masked) & (part < CELL)
    index = tl.load(ids_ptr + image * masked + m, mask=inside, other=0).to(tl.int32)
    columns = width // PATCH
    top = index // columns * PATCH + place // SIDE * CELL
    x = index % columns * PATCH + place % SIDE * CELL + part
    image_ptr = images_ptr + image * height * width * CHANNELS
    histogram = tl.zeros([BLOCK_F, LANES], tl.float32)
    for word in tl.static_range(CHANNELS):
        difference_0, smooth_0 = row_filters(image_ptr, top - 1, x, inside, height, width, word, CHANNELS, ALIGNED)
        difference_1, smooth_1 = row_filters(image_ptr, top, x, inside, height, width, word, CHANNELS, ALIGNED)
        for row in range(CELL):
            below = top + row + 1
            difference_2, smooth_2 = row_filters(image_ptr, below, x, inside, height, width, word, CHANNELS, ALIGNED)
            dx, dy = difference_0 + 2 * difference_1 + difference_2, smooth_2 - smooth_0
            for byte in tl.static_range(4):
                counted = part + (4 * word + byte) // CHANNELS < CELL
                # Bins are counted from the y axis, as in MaskFeat.
                a, b = take(dy, byte), take(dx, byte)
                histogram = add_votes(histogram, a, b, counted, cotangent_ptr, 4 * word + byte, BINS, CHANNELS)
            difference_0, smooth_0 = difference_1, smooth_1
            difference_1, smooth_1 = difference_2, smooth_2
    feature = tl.arange(0, BLOCK_F)[:, None]
    histogram = normalised(histogram, feature, BINS, CHANNELS, LANES, CELL_LANES, BLOCK_F)
    stored = ((part == 0) & (m < masked))[None, :] & (feature < CHANNELS * BINS)
    offset = (image * masked * (SIDE * SIDE) + cell)[None, :] * (CHANNELS * BINS) + feature
    tl.store(out_ptr + offset, histogram.to(out_ptr.dtype.element_ty), mask=stored)


@functools.cache
def cotangents(device: torch.device, bins: int) -> Tensor:
    """Return the cotangents of the angles that part the bins, and a zero, [Q] float32; kept, for a copy would wait.

    A gradient (dx, dy) is beyond an angle where dx <= cotangent * dy. Of a float32 and its neighbours that one is
    taken whose products, rounded, order all gradients of uint8 pixels as the boundaries themselves do.
    """
    dy = torch.arange(1, 1021, dtype=torch.float64)
    found = []
    for cos, sin in boundaries(bins):
        exact = torch.tensor(cos / sin, dtype=torch.float32)
        candidates = [exact, *(torch.nextafter(exact, torch.tensor(x)) for x in (-math.inf, math.inf))]
        near = (dy * cos / sin).floor() + torch.arange(-1, 3)[:, None]
        beyond = cos * dy - sin * near >= 0
        fit = [c for c in candidates if torch.equal(beyond, near.float() <= c * dy.float())]
        found.append((fit or candidates)[0].item())
    return torch.tensor([*found, 0.0], dtype=torch.float32, device=device)


def hog_target(
    images_BHWC: Tensor, ids_masked_BM: Tensor, patch: int, bins: int, cell: int, dtype: torch.dtype
) -> Tensor:
    """Launch the kernel; return [B, M, F] in `dtype`. Cells have at most 128 x 128 pixels, C * Q is at most 128."""
    B, M = ids_masked_BM.shape
    _, H, W, C = images_BHWC.shape
    cell_lanes = fitting(_CELLS, cell, "cell") // 4
    images_BHWC = images_BHWC.contiguous()
    cells = (patch // cell) ** 2
    tiles = triton.cdiv(M * cells * cell_lanes, _LANES)
    out_BMF = torch.empty((B, M, cells * C * bins), dtype=dtype, device=images_BHWC.device)
    ids_masked_BM = checked_ids(ids_masked_BM, (H // patch) * (W // patch))
    tensors = (images_BHWC, ids_masked_BM, cotangents(images_BHWC.device, bins), out_BMF)
    options = {
        "PATCH": patch,
        "CELL": cell,
        "CHANNELS": C,
        "BINS": bins,
        "LANES": _LANES,
        "CELL_LANES": cell_lanes,
        "BLOCK_F": fitting(_FEATURES, C * bins, "channels * bins"),
        # Words of four bytes; the last pixels of a cell of another size would share one with the next cell.
        "ALIGNED": cell % 4 == 0 and images_BHWC.data_ptr() % 4 == 0,
    }
    launch(ccmim_hog_target_kernel, B * tiles, *tensors, H, W, M, tiles, **options, warps=1, fp_fusion=True)
    return out_BMF
