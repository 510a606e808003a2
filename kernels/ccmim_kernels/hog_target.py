"""The op `hog_target` computes histograms of oriented gradients of the masked patches."""

# B batch, H height, W width, C channels, L patches, M masked, Q bins, F features per patch

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ccmim_kernels.dispatch import check_pixels, choosable, operator, uses_triton
from ccmim_kernels.masked_patch_loss import patchify

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
EPS = 1e-12  # of the histogram's L2 norm; a constant cell gives zeros


def gradients(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Sobel gradients (along x, along y), each [B, C, H, W], borders reflected."""
    x = F.pad(images_BCHW, (1, 1, 1, 1), mode="reflect")
    smooth_y = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
    smooth_x = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    return smooth_y[..., 2:] - smooth_y[..., :-2], smooth_x[:, :, 2:] - smooth_x[:, :, :-2]


def boundaries(bins: int) -> list[tuple[float, float]]:
    """Return (cos, sin) of the angles k * pi / bins, k = 1 .. bins - 1, that part the bins.

    Multiples of 2**-24, which float32 holds exactly, whatever dtype is computed in: so the bins are the same in all.
    The cosine is the sine of the complement: at 45 degrees they are equal, at 90 degrees it is zero.
    """
    angles = ((math.sin(math.pi * (bins - 2 * k) / (2 * bins)), math.sin(math.pi * k / bins)) for k in range(1, bins))
    return [(round(cos * 2**24) / 2**24, round(sin * 2**24) / 2**24) for cos, sin in angles]


def orientation_bins(a: Tensor, b: Tensor, bins: int) -> Tensor:
    """Count the boundaries reached: floor(angle / 180 degrees * bins) int64, angle = atan2(b, a) mod 180 degrees.

    `a` and `b` are whole numbers up to 1020. A gradient on a boundary (45, 90, 135 degrees) is in the bin above it.
    """
    flipped = (b < 0) | ((b == 0) & (a < 0))
    a, b = torch.where(flipped, -a, a), torch.where(flipped, -b, b)
    reached = torch.zeros_like(a, dtype=torch.int64)
    for cos, sin in boundaries(bins):
        reached += cos * b - sin * a >= 0
    return reached


def hog_target_reference(
    images_BHWC: Tensor, ids_masked_BM: Tensor, patch: int, bins: int, cell: int, dtype: torch.dtype
) -> Tensor:
    """Specify `hog_target` in plain PyTorch."""
    dx, dy = gradients(images_BHWC.permute(0, 3, 1, 2).to(dtype))
    votes_BCHWQ = F.one_hot(orientation_bins(dy, dx, bins), bins) * (dx.square() + dy.square()).sqrt()[..., None]
    B, C, H, W, _ = votes_BCHWQ.shape
    cells = votes_BCHWQ.reshape(B, C, H // cell, cell, W // cell, cell, bins).sum((3, 5))
    cells = cells / cells.square().sum(-1, keepdim=True).sqrt().clamp(min=EPS)
    # Cells are the pixels of a small image with C * Q channels; its patches are the targets.
    small_BHWF = cells.permute(0, 2, 3, 1, 4).reshape(B, H // cell, W // cell, C * bins)
    targets_BLF = patchify(small_BHWF, patch // cell)
    return targets_BLF.gather(1, ids_masked_BM[..., None].expand(-1, -1, targets_BLF.shape[-1]))


@choosable("hog_target")
@torch.no_grad()
def hog_target(
    images_BHWC: Tensor,
    ids_masked_BM: Tensor,
    *,
    patch: int,
    bins: int = 9,
    cell: int = 8,
    dtype: torch.dtype = torch.float32,
    kernels: str = "auto",
) -> Tensor:
    """Compute HOG features of the masked patches (MaskFeat, Wei et al. 2021; the T of Eq. 3).

    Per channel: Sobel gradients with reflected borders, each pixel votes with its gradient's length for one of `bins`
    orientations over 180 degrees (bin floor(angle / 180 * bins), angle = atan2(dx, dy) mod 180, exactly), votes are
    summed over cells of `cell` x `cell` pixels, each cell's histogram is divided by its L2 norm.

    Args:
        images_BHWC: [B, H, W, C] uint8 or float32, H and W multiples of `patch` and at least 2.
        ids_masked_BM: [B, M] int64, 0 .. L - 1. IndexError for others on a CPU; CUDA looks at none.
        patch: pixels per side, a multiple of `cell`.
        dtype: of the result; computed in float32, or in float64 where that is asked for.
        kernels: `auto`, `triton` or `reference`, see `ccmim_kernels.dispatch`. The kernel takes four bytes for four
            pixels: float32 images go by the reference, whatever is chosen.

    Returns:
        [B, M, F], F = (patch / cell)**2 * C * bins, ordered (cell row, cell column, channel, bin). It has no gradient.
    """
    B, H, W, _ = images_BHWC.shape
    if patch % cell:
        raise ValueError(f"cell={cell} must divide patch={patch}")
    check_pixels(images_BHWC)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype} must be one of {', '.join(str(d) for d in _DTYPES)}")
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    if H % patch or W % patch or min(H, W) < 2:
        raise ValueError(f"image {H}x{W} must be at least 2x2 and a multiple of patch={patch}")
    if len(ids_masked_BM) != B:
        raise ValueError(f"images are {B}, ids are of {len(ids_masked_BM)}")
    triton = uses_triton(kernels, "hog_target", images_BHWC.device, torch.empty(0, dtype=dtype))
    if triton and images_BHWC.dtype == torch.uint8:
        return _hog_target(images_BHWC, ids_masked_BM, patch, bins, cell, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return hog_target_reference(images_BHWC, ids_masked_BM, patch, bins, cell, wide).to(dtype)


@operator("hog_target")
def _hog_target(images: Tensor, ids_masked: Tensor, patch: int, bins: int, cell: int, dtype: torch.dtype) -> Tensor:
    B, M = ids_masked.shape
    return images.new_empty((B, M, (patch // cell) ** 2 * images.shape[-1] * bins), dtype=dtype)
