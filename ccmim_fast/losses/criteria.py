"""The losses: L = L_recons + lambda * L_contrast (Eq. 10), and the criteria it is made of.

A target is a line of `registry.TARGETS`. Its criterion is L_recons (Eq. 9): it is built with the side of a patch in
pixels, mean and std of the images per channel, and settings of the section `target` as keyword arguments; `width` is P,
the number of values that the decoder predicts of a patch. It is called with predictions [B, M, P], which receive a
gradient, images [B, H, W, C] (uint8 or float32) and masked patches [B, M] int64, and returns the mean over all
predicted values.

A contrastive loss is a line of `registry.CONTRASTS`. Its criterion is built with settings of the section `contrast` and
called with hV [B, E] (for Eq. 8 p(hV)), the teacher hM [B, E], which receives no gradient, and the rows of all ranks
[N, E] in rank order (None: there is one rank); it returns the mean over the local images, whose mean over ranks is that
of the global batch, or a loss of this rank's batch as a whole. All are scalars, float32.
"""

# B local batch, N global batch, H height, W width, C channels, M masked, P values per patch, E embedding dim

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ccmim_fast.errors import ConfigError
from ccmim_fast.models.ccmim import Output
from ccmim_kernels import hog_target, info_nce, masked_patch_loss, moco_nce

HOG_BINS = 9  # orientations over 180 degrees; MaskFeat


class Losses(NamedTuple):
    """Scalars, float32, on the device; `contrast` is None where the run has none."""

    total: Tensor
    recons: Tensor
    contrast: Tensor | None


class Objective(nn.Module):
    """This criterion is Eq. 10 of one micro-batch on this rank: DDP's mean over ranks is the global batch's loss.

    Every rank must go back through it: gradients of the contrastive half are summed over all of them. It has the
    criterion of a target, a contrastive one or None, and `weight`, which is lambda.
    """

    def __init__(self, reconstruction: nn.Module, contrast: nn.Module | None = None, weight: float = 0.0):
        super().__init__()
        self.reconstruction, self.contrast, self.weight = reconstruction, contrast, weight

    def forward(self, output: Output, images_BHWC: Tensor) -> Losses:
        """Compute the losses of a forward pass over images [B, H, W, C]."""
        recons = self.recons(output, images_BHWC)
        if self.contrast is None:
            return Losses(recons, recons, None)
        contrast = self.contrast(output.visible_BE, output.masked_BE, output.gathered_NE)
        return Losses(recons + self.weight * contrast, recons, contrast)

    def recons(self, output: Output, images_BHWC: Tensor) -> Tensor:
        """Compute L_recons (Eq. 9) alone; scalar float32, no collective."""
        return self.reconstruction(output.pred_BMP, images_BHWC, output.partition.ids_masked_BM)


class Pixels(nn.Module):
    """The mean squared error of pixels, per patch normalised or not, see `ccmim_kernels.masked_patch_loss`."""

    def __init__(
        self, patch: int, mean: tuple[float, ...], std: tuple[float, ...], *, norm_pix: bool, kernels: str = "auto"
    ):
        super().__init__()
        self.patch, self.norm_pix, self.kernels = patch, norm_pix, kernels
        self.width = patch * patch * len(mean)
        self.register_buffer("mean_C", torch.tensor(mean), persistent=False)
        self.register_buffer("std_C", torch.tensor(std), persistent=False)

    def forward(self, pred_BMP: Tensor, images_BHWC: Tensor, ids_masked_BM: Tensor) -> Tensor:
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
    """The mean squared error of HOG features, see `hog_target`; ConfigError: `hog_cell` does not divide `patch`."""

    def __init__(
        self, patch: int, mean: tuple[float, ...], std: tuple[float, ...], *, hog_cell: int, kernels: str = "auto"
    ):
        super().__init__()
        if patch % hog_cell:
            nearest = min((n for n in range(1, patch + 1) if patch % n == 0), key=lambda n: abs(n - hog_cell))
            raise ConfigError(f"target.hog_cell={hog_cell} must divide the patch size {patch}; nearest: {nearest}")
        self.patch, self.hog_cell, self.kernels = patch, hog_cell, kernels
        self.width = (patch // hog_cell) ** 2 * len(mean) * HOG_BINS

    def forward(self, pred_BMP: Tensor, images_BHWC: Tensor, ids_masked_BM: Tensor) -> Tensor:
        wide = torch.promote_types(pred_BMP.dtype, torch.float32)
        sizes = {"patch": self.patch, "bins": HOG_BINS, "cell": self.hog_cell}
        target_BMP = hog_target(images_BHWC, ids_masked_BM, **sizes, dtype=wide, kernels=self.kernels)
        return (pred_BMP.to(wide) - target_BMP).square().mean()


class InfoNCE(nn.Module):
    """L_NCE (Eq. 7), tau is `temperature`; the rows of all ranks are hV, which receives a gradient."""

    def __init__(self, *, temperature: float, kernels: str = "auto"):
        super().__init__()
        self.temperature, self.kernels = temperature, kernels

    def forward(self, visible_BE: Tensor, masked_BE: Tensor, gathered_NE: Tensor | None = None) -> Tensor:
        offset = _offset(visible_BE, gathered_NE)
        return info_nce(masked_BE, visible_BE, gathered_NE, offset=offset, tau=self.temperature, kernels=self.kernels)


class MoCo(InfoNCE):
    """The authors' code's form: cross-entropy of hV against the hM of all ranks, times 2 tau."""

    def forward(self, visible_BE: Tensor, masked_BE: Tensor, gathered_NE: Tensor | None = None) -> Tensor:
        offset = _offset(visible_BE, gathered_NE)
        rows_NE = masked_BE if gathered_NE is None else gathered_NE
        return moco_nce(visible_BE, rows_NE, offset=offset, tau=self.temperature, kernels=self.kernels)


class Align(nn.Module):
    """L_align (Eq. 8): the mean of 1 - cos(SG(hM_i), p(hV_i)); it compares with no other image."""

    def forward(self, visible_BE: Tensor, masked_BE: Tensor, gathered_NE: Tensor | None = None) -> Tensor:
        wide = torch.promote_types(visible_BE.dtype, torch.float32)
        return (1 - F.cosine_similarity(masked_BE.detach().to(wide), visible_BE.to(wide), dim=-1)).mean()


def _offset(visible_BE: Tensor, gathered_NE: Tensor | None) -> int:
    """Return the row of all ranks' that the first local one is."""
    return 0 if gathered_NE is None else dist.get_rank() * len(visible_BE)
