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


def hog_target(
    images_BHWC: Tensor, ids_masked_BM: Tensor, patch: int, bins: int, cell: int, dtype: torch.dtype
) -> Tensor:
    """See `op.hog_target`."""
    dx, dy = gradients(images_BHWC.permute(0, 3, 1, 2).to(dtype))
    angle = torch.atan2(dy, dx).remainder(math.pi)
    bin_BCHW = (angle * (bins / math.pi)).long().clamp(max=bins - 1)
    votes_BCHWQ = F.one_hot(bin_BCHW, bins) * (dx.square() + dy.square()).sqrt()[..., None]
    B, C, H, W, _ = votes_BCHWQ.shape
    cells = votes_BCHWQ.reshape(B, C, H // cell, cell, W // cell, cell, bins).sum((3, 5))
    cells = cells / cells.square().sum(-1, keepdim=True).sqrt().clamp(min=_EPS)
    # Cells are the pixels of a small image with C * Q channels; its patches are the targets.
    small_BHWF = cells.permute(0, 2, 3, 1, 4).reshape(B, H // cell, W // cell, C * bins)
    targets_BLF = patchify(small_BHWF, patch // cell)
    return targets_BLF.gather(1, ids_masked_BM[..., None].expand(-1, -1, targets_BLF.shape[-1]))
