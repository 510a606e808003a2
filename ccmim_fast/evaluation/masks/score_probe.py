"""How a run's own scores and masks, on its training images, fall on the objects in them, where these are known."""

# B images, L patches

from typing import NamedTuple

import numpy as np
import torch

from ccmim_fast.bank.bank import read_maps
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.stream.batch import make_batch
from ccmim_fast.data.stream.torch_loader import load_crop
from ccmim_fast.engine.pretraining import Pretraining
from ccmim_fast.evaluation.masks.metrics import object_leakage, score_auroc
from ccmim_fast.evaluation.masks.objects import objects_of
from ccmim_fast.models.scores import AllBlocks, PriorScores


class ScoreProbe(NamedTuple):
    """Figures of one moment.

    Attributes:
        recons: L_recons (Eq. 9) under the run's own masks.
        auroc: of the scores that the run divides by, against object patches; 0.5 where it has none.
        auroc_all: of the scores from all blocks of the same encoder, whatever the run divides by.
        leakage: share of object patches left visible, relative to random masking. These three are None where nobody
            knows the objects.
    """

    recons: float
    auroc: float | None = None
    auroc_all: float | None = None
    leakage: float | None = None


@torch.no_grad()
def probe_scores(run: Pretraining, epoch: int, count: int) -> ScoreProbe:
    """Divide the first `count` samples of an epoch as the run would, with that epoch's crops and noise.

    The model is to be in eval mode. Nothing of the run changes: a bank is read, not written.
    """
    model, plan, size = run.model, run.loader.plan, run.config.data.image_size
    places_P = epoch * plan.samples + np.arange(min(count, plan.samples))
    own_P = np.isin(places_P % plan.samples % plan.partitions, plan.own_partitions)
    shown = plan.micro_batch(*plan.ids_at(places_P[own_P]))
    images_BHWC = torch.from_numpy(np.stack([load_crop(run.source, one, size) for one in shown.samples()]))
    batch = make_batch(images_BHWC.to(run.here.device), shown, run.source, run.here.device)
    known = None
    if run.bank is not None:
        known = PriorScores(*read_maps(run.bank.maps_of(shown.ids_B), batch.boxes_B4, model.grid))
    output = model(batch.images_BHWC, batch.ids_B, batch.epochs_B, prior=known)
    recons = float(run.train_step.objective.recons(output, batch.images_BHWC))
    if not isinstance(run.source, ShapesSource):
        return ScoreProbe(recons)
    all_BL = AllBlocks(model.encoder)(model.encoder, model.embed(batch.images_BHWC)).logits_BL
    object_BL = objects_of(run.source, shown, size, model.patch)
    logits_BL = output.logits_BL if output.logits_BL is not None else torch.zeros(object_BL.shape)
    return ScoreProbe(
        recons,
        auroc=score_auroc(logits_BL.cpu(), object_BL),
        auroc_all=score_auroc(all_BL.cpu(), object_BL),
        leakage=object_leakage(output.partition.mask_BL.cpu(), object_BL, 1 - model.keep / object_BL.shape[1]),
    )
