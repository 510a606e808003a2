"""Histograms of oriented gradients in plain PyTorch: the specification of `hog_target`."""

# B batch, H height, W width, C channels, L patches, M masked, Q bins

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ccmim_kernels.patches import patchify

_EPS = 1e-12  # of the histogram's L2 norm; a constant cell gives zeros


def gradients(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel gradients (along x, along y), each [B, C, H, W], borders reflected."""
    x = F.pad(images_BCHW, (1, 1, 1, 1), mode="reflect")
    smooth_y = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
    smooth_x = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    return smooth_y[..., 2:] - smooth_y[..., :-2], smooth_x[:, :, 2:] - smooth_x[:, :, :-2]


def boundaries(bins: int) -> list[tuple[float, float]]:
    """(cos, sin) of the angles k * pi / bins, k = 1 .. bins - 1, that part the bins.

    Multiples of 2**-24, which float32 holds exactly, whatever dtype is computed in: so the bins are the same in all.
    The cosine is the sine of the complement: at 45 degrees they are equal, at 90 degrees it is zero.
    """
    angles = ((math.sin(math.pi * (bins - 2 * k) / (2 * bins)), math.sin(math.pi * k / bins)) for k in range(1, bins))
    return [(round(cos * 2**24) / 2**24, round(sin * 2**24) / 2**24) for cos, sin in angles]


def orientation_bins(dx: Tensor, dy: Tensor, bins: int) -> Tensor:
    """floor(angle / 180 degrees * bins) int64, angle = atan2(dy, dx) mod 180 degrees: the number of boundaries reached.

    `dx` and `dy` are whole numbers up to 1020. A gradient on a boundary (45, 90, 135 degrees) is in the bin above it.
    """
    flipped = (dy < 0) | ((dy == 0) & (dx < 0))
    dx, dy = torch.where(flipped, -dx, dx), torch.where(flipped, -dy, dy)
    reached = torch.zeros_like(dx, dtype=torch.int64)
    for cos, sin in boundaries(bins):
        reached += cos * dy - sin * dx >= 0
    return reached


def hog_target(
    images_BHWC: Tensor, ids_masked_BM: Tensor, patch: int, bins: int, cell: int, dtype: torch.dtype
) -> Tensor:
    """See `op.hog_target`."""
    dx, dy = gradients(images_BHWC.permute(0, 3, 1, 2).to(dtype))
    votes_BCHWQ = F.one_hot(orientation_bins(dx, dy, bins), bins) * (dx.square() + dy.square()).sqrt()[..., None]
    B, C, H, W, _ = votes_BCHWQ.shape
    cells = votes_BCHWQ.reshape(B, C, H // cell, cell, W // cell, cell, bins).sum((3, 5))
    cells = cells / cells.square().sum(-1, keepdim=True).sqrt().clamp(min=_EPS)
    # Cells are the pixels of a small image with C * Q channels; its patches are the targets.
    small_BHWF = cells.permute(0, 2, 3, 1, 4).reshape(B, H // cell, W // cell, C * bins)
    targets_BLF = patchify(small_BHWF, patch // cell)
    return targets_BLF.gather(1, ids_masked_BM[..., None].expand(-1, -1, targets_BLF.shape[-1]))
