"""L = L_recons + lambda * L_contrast (Eq. 10), from the model's tensors."""

from typing import NamedTuple

from torch import Tensor

from ccmim_fast.config.schema import Config
from ccmim_fast.losses.contrastive import contrastive_loss
from ccmim_fast.losses.reconstruction import reconstruction_loss
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.output import Output


class Losses(NamedTuple):
    """Scalars, float32, on the device; `contrast` is None where the run has none."""

    total: Tensor
    recons: Tensor
    contrast: Tensor | None


def recons_loss(model: CCMIM, output: Output, images_BHWC: Tensor, config: Config) -> Tensor:
    """L_recons (Eq. 9) of one micro-batch on this rank, as `config.target` says; scalar float32, no collective."""
    return reconstruction_loss(
        output.pred_BMP,
        images_BHWC,
        output.partition.ids_masked_BM,
        kind=config.target.kind,
        patch=model.patch,
        mean_C=model.mean_C,
        std_C=model.std_C,
        norm_pix=config.target.norm_pix,
        hog_bins=config.target.hog_bins,
        hog_cell=config.target.hog_cell,
        kernels=config.train.kernels,
    )


def total_loss(model: CCMIM, output: Output, images_BHWC: Tensor, config: Config) -> Losses:
    """Eq. 10 of one micro-batch on this rank: DDP's mean over ranks is the loss of the global batch.

    Every rank must go back through it: gradients of the contrastive half are summed over all of them.
    """
    recons = recons_loss(model, output, images_BHWC, config)
    if config.contrast.loss == "none":
        return Losses(recons, recons, None)
    contrast = contrastive_loss(
        output.visible_BE,
        output.masked_BE,
        output.rows_NE,
        kind=config.contrast.loss,
        tau=config.contrast.temperature,
        kernels=config.train.kernels,
    )
    return Losses(recons + config.contrast.weight * contrast, recons, contrast)
