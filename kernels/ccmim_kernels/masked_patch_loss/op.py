"""Public functions of the op: argument checks, then the implementation."""

# B batch, H height, W width, C channels, M masked, P patch * patch * C

import torch
from torch import Tensor

from ccmim_kernels.masked_patch_loss import reference

masked_target = reference.masked_target


def masked_patch_loss(
    pred_BMP: Tensor,
    images_BHWC: Tensor,
    ids_masked_BM: Tensor,
    *,
    patch: int,
    mean_C: Tensor,
    std_C: Tensor,
    norm_pix: bool = True,
) -> Tensor:
    """L_recons (Eq. 9): mean squared error between prediction and pixels, over the masked patches only.

    The target is x = (u / 255 - mean) / std of the uint8 pixels u, with `norm_pix` normalised per patch as in MAE:
    (x - E[x]) / sqrt(Var[x] + 1e-6), the variance unbiased.

    Args:
        pred_BMP: [B, M, P] float, rows in the order of `ids_masked_BM`, pixels as (row, column, channel); receives a
            gradient.
        images_BHWC: [B, H, W, C] uint8.
        ids_masked_BM: [B, M] int64.
        patch: pixels per side.
        mean_C, std_C: [C] float, on a 0..1 scale.

    Returns:
        A scalar, the mean over B, M and P; float32, or float64 from float64.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    B, M = ids_masked_BM.shape
    P = patch * patch * images_BHWC.shape[-1]
    if images_BHWC.dtype != torch.uint8:
        raise ValueError(f"images are {images_BHWC.dtype}, expected torch.uint8")
    if tuple(pred_BMP.shape) != (B, M, P):
        raise ValueError(f"prediction is {list(pred_BMP.shape)}, expected [{B}, {M}, {P}]")
    if pred_BMP.dtype != torch.float64:
        pred_BMP = pred_BMP.float()
    return reference.masked_patch_loss(pred_BMP, images_BHWC, ids_masked_BM, patch, mean_C, std_C, norm_pix)
