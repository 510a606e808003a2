"""L = L_recons + lambda * L_contrast (Eq. 10), and L_recons (Eq. 9) against pixels or HOG features.

A target is a criterion in `registry.TARGETS`: it is built with the patch's side in pixels, the images' mean and std per
channel, and settings of the section `target` as keyword arguments; `width` is P, the values that the decoder predicts
of a patch; it is called with predictions, images and masked patches.
"""

# B batch, H height, W width, C channels, M masked, P values per patch

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ccmim_fast.errors import ConfigError
from ccmim_fast.models.output import Output
from ccmim_kernels import hog_target, masked_patch_loss


class Losses(NamedTuple):
    """Scalars, float32, on the device; `contrast` is None where the run has none."""

    total: Tensor
    recons: Tensor
    contrast: Tensor | None


class Objective(nn.Module):
    """This criterion is Eq. 10 of one micro-batch on this rank: DDP's mean over ranks is the global batch's loss.

    Every rank must go back through it: gradients of the contrastive half are summed over all of them.

    Args:
        reconstruction: one of this file's criteria.
        contrast: one of `losses.contrastive`, or None.
        weight: lambda.
    """

    def __init__(self, reconstruction: nn.Module, contrast: nn.Module | None = None, weight: float = 0.0):
        super().__init__()
        self.reconstruction, self.contrast, self.weight = reconstruction, contrast, weight

    def forward(self, output: Output, images_BHWC: Tensor) -> Losses:
        """Compute the losses of a forward pass over uint8 images [B, H, W, C]."""
        recons = self.recons(output, images_BHWC)
        if self.contrast is None:
            return Losses(recons, recons, None)
        contrast = self.contrast(output.visible_BE, output.masked_BE, output.gathered_NE)
        return Losses(recons + self.weight * contrast, recons, contrast)

    def recons(self, output: Output, images_BHWC: Tensor) -> Tensor:
        """Compute L_recons (Eq. 9) alone; scalar float32, no collective."""
        return self.reconstruction(output.pred_BMP, images_BHWC, output.partition.ids_masked_BM)


class Pixels(nn.Module):
    """The mean squared error of predicted pixels, see `ccmim_kernels.masked_patch_loss`.

    Args:
        norm_pix: predict pixels that are normalised per patch.
        kernels: which implementation of the op runs, see `ccmim_kernels.dispatch`.
    """

    def __init__(
        self, patch: int, mean: tuple[float, ...], std: tuple[float, ...], *, norm_pix: bool, kernels: str = "auto"
    ):
        super().__init__()
        self.patch, self.norm_pix, self.kernels = patch, norm_pix, kernels
        self.width = patch * patch * len(mean)
        self.register_buffer("mean_C", torch.tensor(mean), persistent=False)
        self.register_buffer("std_C", torch.tensor(std), persistent=False)

    def forward(self, pred_BMP: Tensor, images_BHWC: Tensor, ids_masked_BM: Tensor) -> Tensor:
        """Return a scalar float32, the mean over images, masked patches and values; `pred_BMP` receives a gradient."""
        return masked_patch_loss(
            pred_BMP,
            images_BHWC,
            ids_masked_BM,
            patch=self.patch,
            mean_C=self.mean_C,
            std_C=self.std_C,
            norm_pix=self.norm_pix,
            kernels=self.kernels,
        )


class Hog(nn.Module):
    """The mean squared error of predicted HOG features, see `ccmim_kernels.hog_target`.

    Args:
        hog_bins: orientations.
        hog_cell: pixels per side of a cell.

    Raises:
        ConfigError: `hog_cell` does not divide the patch.
    """

    def __init__(
        self,
        patch: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        hog_bins: int,
        hog_cell: int,
        kernels: str = "auto",
    ):
        super().__init__()
        if patch % hog_cell:
            divisors = [size for size in range(1, patch + 1) if patch % size == 0]
            nearest = min(divisors, key=lambda size: abs(size - hog_cell))
            raise ConfigError(f"target.hog_cell={hog_cell} must divide the patch size {patch}; nearest: {nearest}")
        self.patch, self.hog_bins, self.hog_cell, self.kernels = patch, hog_bins, hog_cell, kernels
        self.width = (patch // hog_cell) ** 2 * len(mean) * hog_bins

    def forward(self, pred_BMP: Tensor, images_BHWC: Tensor, ids_masked_BM: Tensor) -> Tensor:
        """Return a scalar float32, the mean over images, masked patches and values; `pred_BMP` receives a gradient."""
        target_BMP = hog_target(
            images_BHWC,
            ids_masked_BM,
            patch=self.patch,
            bins=self.hog_bins,
            cell=self.hog_cell,
            kernels=self.kernels,
        )
        return (pred_BMP.float() - target_BMP).square().mean()
