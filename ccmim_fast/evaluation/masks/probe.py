"""What a model does with held-out images at one moment of its training: where it looks, hides and fails."""

# B batch, H height, W width, L patches

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ccmim_fast.build.model import build_objective
from ccmim_fast.config.schema import Config
from ccmim_fast.evaluation.masks.metrics import object_leakage, object_patches, score_auroc
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.output import Output
from ccmim_fast.models.scores import AllBlocks, PriorScores


class Probe(NamedTuple):
    """Figures on images whose objects are known, under the model's own masks.

    Attributes:
        auroc: of the all-block [CLS] scores against object patches, whatever scores the method itself masks by.
        leakage: share of object patches left visible / (1 - ratio).
        recons: L_recons (Eq. 9).
    """

    auroc: float
    leakage: float
    recons: float


@torch.no_grad()
def probe(model: CCMIM, config: Config, images_BHWC: Tensor, objects_BHW: Tensor) -> tuple[Probe, Output, Tensor]:
    """Run the model on all images at once, in eval mode, with the masks of epoch 0: the same noise at every call.

    A score bank knows nothing of held-out images: it is taken to hold the scores of all blocks, which it records.

    Args:
        images_BHWC: uint8, on the model's device.
        objects_BHW: bool, True on the object, on the CPU.

    Returns:
        The figures, the model's output, and the all-block scores [B, L].
    """
    device = images_BHWC.device
    logits_BL = AllBlocks(model.encoder)(model.encoder, model.embed(images_BHWC)).logits_BL
    known = PriorScores(logits_BL.log_softmax(1) + math.log(logits_BL.shape[1]), torch.ones_like(logits_BL))
    output = model(images_BHWC, torch.arange(len(images_BHWC), device=device), 0, prior=known)
    scores_BL = logits_BL.softmax(1).cpu()
    object_BL = object_patches(objects_BHW, model.patch)
    ratio = 1 - model.keep / object_BL.shape[1]
    figures = Probe(
        auroc=score_auroc(scores_BL, object_BL),
        leakage=object_leakage(output.partition.mask_BL.cpu(), object_BL, ratio),
        recons=float(build_objective(config, model).recons(output, images_BHWC)),
    )
    return figures, output, scores_BL
