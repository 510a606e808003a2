"""Public function of the op: argument checks, then the implementation."""

# B batch, H height, W width, C channels, M masked, F features per patch

import torch
from torch import Tensor

from ccmim_kernels.hog_target import reference


@torch.no_grad()
def hog_target(
    images_BHWC: Tensor,
    ids_masked_BM: Tensor,
    *,
    patch: int,
    bins: int = 9,
    cell: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """HOG features of the masked patches (MaskFeat, Wei et al. 2021; the T of Eq. 3).

    Per channel: Sobel gradients with reflected borders, each pixel votes with its gradient's length for one of `bins`
    orientations over 180 degrees (bin floor(angle / 180 * bins), angle = atan2(dy, dx) mod 180), votes are summed over
    cells of `cell` x `cell` pixels, each cell's histogram is divided by its L2 norm.

    Args:
        images_BHWC: [B, H, W, C] uint8.
        ids_masked_BM: [B, M] int64.
        patch: pixels per side, a multiple of `cell`.
        dtype: of the computation and the result.

    Returns:
        [B, M, F], F = (patch / cell)**2 * C * bins, ordered (cell row, cell column, channel, bin).

    Raises:
        ValueError: `patch` is no multiple of `cell`, or the images are not uint8.
    """
    if patch % cell:
        raise ValueError(f"cell={cell} must divide patch={patch}")
    if images_BHWC.dtype != torch.uint8:
        raise ValueError(f"images are {images_BHWC.dtype}, expected torch.uint8")
    return reference.hog_target(images_BHWC, ids_masked_BM, patch, bins, cell, dtype)
