"""Target and loss in plain PyTorch: the specification of `masked_patch_loss`."""

# B batch, H height, W width, C channels, L patches, M masked, P patch * patch * C

import torch
from torch import Tensor

from ccmim_kernels.patches import patchify

NORM_PIX_EPS = 1e-6  # MAE


def masked_target(
    images_BHWC: Tensor, ids_masked_BM: Tensor, patch: int, mean_C: Tensor, std_C: Tensor, norm_pix: bool
) -> Tensor:
    """Pixels of the masked patches [B, M, P] in the dtype of `mean_C`: (u / 255 - mean) / std, then per patch."""
    patches_BLP = patchify(images_BHWC, patch)
    index_BMP = ids_masked_BM[..., None].expand(-1, -1, patches_BLP.shape[-1])
    pixels_BMP = patches_BLP.gather(1, index_BMP).to(mean_C.dtype) / 255
    channels = patch * patch
    target_BMP = (pixels_BMP - mean_C.repeat(channels)) / std_C.repeat(channels)
    if not norm_pix:
        return target_BMP
    mean_BM1 = target_BMP.mean(-1, keepdim=True)
    var_BM1 = target_BMP.var(-1, keepdim=True, unbiased=True)
    return (target_BMP - mean_BM1) / (var_BM1 + NORM_PIX_EPS).sqrt()


def masked_patch_loss(
    pred_BMP: Tensor,
    images_BHWC: Tensor,
    ids_masked_BM: Tensor,
    patch: int,
    mean_C: Tensor,
    std_C: Tensor,
    norm_pix: bool,
) -> Tensor:
    """See `op.masked_patch_loss`."""
    with torch.no_grad():
        target_BMP = masked_target(images_BHWC, ids_masked_BM, patch, mean_C, std_C, norm_pix)
    return (pred_BMP - target_BMP).square().mean()
