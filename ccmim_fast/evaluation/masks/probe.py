"""Probes measure a model while it trains: its loss, and how its scores and masks fall on the objects in images."""

# B images, H height, W width, L patches

import math

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.bank.bank import read_maps
from ccmim_fast.build.model import build_objective
from ccmim_fast.config.schema import Config
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.stream.batch import make_batch
from ccmim_fast.data.stream.torch_loader import load_crop
from ccmim_fast.engine.pretraining import Pretraining
from ccmim_fast.evaluation.masks.metrics import object_leakage, object_patches, score_auroc
from ccmim_fast.evaluation.masks.objects import objects_of
from ccmim_fast.models.ccmim import CCMIM, Output
from ccmim_fast.models.scores import AllBlocks, PriorScores


@torch.no_grad()
def probe(
    model: CCMIM, config: Config, images_BHWC: Tensor, objects_BHW: Tensor
) -> tuple[dict[str, float], Output, Tensor]:
    """Run the model on all images at once, in eval mode, with the masks of epoch 0: the same noise at every call.

    A score bank knows nothing of held-out images: it is taken to hold the scores of all blocks, which it records. The
    images are uint8 on the model's device; objects are bool, True on the object, on the CPU.

    Returns figures: `auroc` (of the scores of all blocks), `leakage` (of the model's own masks), `recons` (Eq. 9); the
    model's output; and the scores of all blocks [B, L].
    """
    logits_BL = _all_blocks(model, images_BHWC)
    prior = PriorScores(logits_BL.log_softmax(1) + math.log(logits_BL.shape[1]), torch.ones_like(logits_BL))
    output = model(images_BHWC, torch.arange(len(images_BHWC), device=images_BHWC.device), 0, prior=prior)
    scores_BL, object_BL = logits_BL.softmax(1).cpu(), object_patches(objects_BHW, model.patch)
    figures = {
        "auroc": score_auroc(scores_BL, object_BL),
        "leakage": object_leakage(output.partition.mask_BL.cpu(), object_BL),
        "recons": float(build_objective(config, model).recons(output, images_BHWC)),
    }
    return figures, output, scores_BL


@torch.no_grad()
def probe_scores(run: Pretraining, epoch: int, count: int) -> dict[str, float]:
    """Divide the first `count` samples of an epoch as the run would, with that epoch's crops and noise.

    The model is to be in eval mode. Nothing of the run changes: a bank is read, not written. Returns figures under the
    run's own masks: `recons` (Eq. 9) and, where objects are known, `auroc` (of the scores that the run divides by; 0.5
    where it has none), `auroc_all` (of the scores of all blocks), and `leakage`.
    """
    model, plan, size = run.model, run.loader.plan, run.config.data.image_size
    places_P = epoch * plan.samples + np.arange(min(count, plan.samples))
    own_P = np.isin(places_P % plan.samples % plan.partitions, plan.own_partitions)
    shown = plan.micro_batch(*plan.ids_at(places_P[own_P]))
    images_BHWC = torch.from_numpy(np.stack([load_crop(run.source, one, size) for one in shown.samples()]))
    batch = make_batch(images_BHWC.to(run.here.device), shown, run.source, run.here.device)
    prior = None
    if run.bank is not None:
        prior = PriorScores(*read_maps(run.bank.maps_of(shown.ids_B), batch.boxes_B4, model.grid))
    output = model(batch.images_BHWC, batch.ids_B, batch.epochs_B, prior=prior)
    figures = {"recons": float(run.train_step.objective.recons(output, batch.images_BHWC))}
    if isinstance(run.source, ShapesSource):
        object_BL = objects_of(run.source, shown, size, model.patch)
        logits_BL = output.logits_BL if output.logits_BL is not None else torch.zeros(object_BL.shape)
        figures["auroc"] = score_auroc(logits_BL.cpu(), object_BL)
        figures["auroc_all"] = score_auroc(_all_blocks(model, batch.images_BHWC).cpu(), object_BL)
        figures["leakage"] = object_leakage(output.partition.mask_BL.cpu(), object_BL)
    return figures


def _all_blocks(model: CCMIM, images_BHWC: Tensor) -> Tensor:
    return AllBlocks(model.encoder)(model.encoder, model.embed(images_BHWC))
