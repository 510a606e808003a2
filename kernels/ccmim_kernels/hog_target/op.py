"""Public function of the op: argument checks, then the implementation."""

# B batch, H height, W width, C channels, M masked, F features per patch

import torch
from torch import Tensor

from ccmim_kernels.dispatch import uses_triton
from ccmim_kernels.hog_target import reference

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
    """HOG features of the masked patches (MaskFeat, Wei et al. 2021; the T of Eq. 3).

    Per channel: Sobel gradients with reflected borders, each pixel votes with its gradient's length for one of `bins`
    orientations over 180 degrees (bin floor(angle / 180 * bins), angle = atan2(dy, dx) mod 180, exactly), votes are
    summed over cells of `cell` x `cell` pixels, each cell's histogram is divided by its L2 norm.

    Args:
        images_BHWC: [B, H, W, C] uint8, H and W multiples of `patch` and at least 2.
        ids_masked_BM: [B, M] int64, 0 .. L - 1.
        patch: pixels per side, a multiple of `cell`.
        dtype: of the result; computed in float32, or in float64 where that is asked for.
        kernels: `auto`, `triton` or `reference`, see `ccmim_kernels.dispatch`.

    Returns:
        [B, M, F], F = (patch / cell)**2 * C * bins, ordered (cell row, cell column, channel, bin). It has no gradient.

    Raises:
        ValueError: sizes or dtypes that do not fit.
    """
    B, H, W, _ = images_BHWC.shape
    if patch % cell:
        raise ValueError(f"cell={cell} must divide patch={patch}")
    if images_BHWC.dtype != torch.uint8:
        raise ValueError(f"images are {images_BHWC.dtype}, expected torch.uint8")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype} must be one of {', '.join(str(d) for d in _DTYPES)}")
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    if H % patch or W % patch or min(H, W) < 2:
        raise ValueError(f"image {H}x{W} must be at least 2x2 and a multiple of patch={patch}")
    if len(ids_masked_BM) != B:
        raise ValueError(f"images are {B}, ids are of {len(ids_masked_BM)}")
    if uses_triton(kernels, "hog_target", images_BHWC.device, torch.empty(0, dtype=dtype)):
        return _hog_target(images_BHWC, ids_masked_BM, patch, bins, cell, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return reference.hog_target(images_BHWC, ids_masked_BM, patch, bins, cell, wide).to(dtype)


@torch.library.custom_op("ccmim::hog_target", mutates_args=())
def _hog_target(images: Tensor, ids_masked: Tensor, patch: int, bins: int, cell: int, dtype: torch.dtype) -> Tensor:
    from ccmim_kernels.hog_target import triton_impl

    return triton_impl.hog_target(images, ids_masked, patch, bins, cell, dtype)


@_hog_target.register_fake
def _(images, ids_masked, patch, bins, cell, dtype):
    B, M = ids_masked.shape
    return images.new_empty((B, M, (patch // cell) ** 2 * images.shape[-1] * bins), dtype=dtype)
