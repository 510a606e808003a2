"""L_recons (Eq. 9): mean squared error on the masked patches, against pixels or HOG features."""

from torch import Tensor

from ccmim_kernels import hog_target, masked_patch_loss


def reconstruction_loss(
    pred_BMP: Tensor,
    images_BHWC: Tensor,
    ids_masked_BM: Tensor,
    *,
    kind: str,
    patch: int,
    mean_C: Tensor,
    std_C: Tensor,
    norm_pix: bool,
    hog_bins: int,
    hog_cell: int,
    kernels: str = "auto",
) -> Tensor:
    """Scalar float32: the mean over images, masked patches and the values of a patch.

    Args:
        pred_BMP: [B, M, P] float, receives a gradient.
        images_BHWC: [B, H, W, C] uint8.
        ids_masked_BM: [B, M] int64.
        kind: `pixels` (see `ccmim_kernels.masked_patch_loss`) or `hog` (see `ccmim_kernels.hog_target`).
        kernels: which implementation of the op runs, see `ccmim_kernels.dispatch`.
    """
    if kind == "pixels":
        return masked_patch_loss(
            pred_BMP,
            images_BHWC,
            ids_masked_BM,
            patch=patch,
            mean_C=mean_C,
            std_C=std_C,
            norm_pix=norm_pix,
            kernels=kernels,
        )
    target_BMP = hog_target(images_BHWC, ids_masked_BM, patch=patch, bins=hog_bins, cell=hog_cell, kernels=kernels)
    return (pred_BMP.float() - target_BMP).square().mean()
