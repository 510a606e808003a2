"""How the scores and masks of a run's own steps fall on the objects, where these are known."""

# B images, H height, W width, L patches

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.data.batch import Batch
from ccmim_fast.data.plan import MicroBatch
from ccmim_fast.data.shapes import ShapesSource
from ccmim_fast.data.torch_loader import crop_and_resize
from ccmim_fast.evaluation.masks import object_leakage, object_patches, score_auroc
from ccmim_fast.trainer.loop import Trainer
from ccmim_fast.trainer.step import StepResult

LOOKED_AT = 256  # images of a step at most: 26 ms of a core at 64 pixels a side, 143 ms at 224 (AMD EPYC)


def object_figures(run: Trainer, batches: Sequence[Batch], result: StepResult) -> dict[str, float | None]:
    """Of the first images of this rank's last micro-batch, as the step divided them; the model is not called.

    Returns:
        auroc: of the scores against object patches, see `score_auroc`; None without scores, and where they hold NaN.
        leakage: share of object patches left visible, relative to random masking. None where nothing but objects, or
            none of them, is seen.
    """
    batch, seen, config = batches[-1], result.seen[-1], run.config
    few = slice(0, LOOKED_AT)
    shown = run.loader.plan.showing(batch.host_ids_B[few], batch.epochs_B[few].cpu().numpy())
    object_BL = objects_of(run.source, shown, config.data.image_size, run.model.patch)
    mask_BL = seen.mask_BL[few].cpu()
    leakage = object_leakage(mask_BL, object_BL, 1 - run.model.keep / mask_BL.shape[1]) if object_BL.any() else None
    return {"auroc": _auroc(seen.logits_BL, object_BL), "leakage": leakage}


def _auroc(logits_BL: Tensor | None, object_BL: Tensor) -> float | None:
    both_B = object_BL.any(1) & ~object_BL.all(1)
    if logits_BL is None or not both_B.any():
        return None
    logits_BL = logits_BL[: len(object_BL)].float().cpu()
    return None if logits_BL.isnan().any() else score_auroc(logits_BL, object_BL)


def objects_of(source: ShapesSource, shown: MicroBatch, image_size: tuple[int, int], patch: int) -> Tensor:
    """Which patches of the crops show the object, [B, L] bool."""
    objects_BHW = np.stack([_object_of(source, one, image_size) for one in shown.samples()])
    return object_patches(torch.from_numpy(objects_BHW), patch)


def _object_of(source: ShapesSource, one: MicroBatch, image_size: tuple[int, int]) -> np.ndarray:
    """Which pixels of a crop show the object, [H, W] bool."""
    mask_HW1 = 255 * source.mask(one.ids_B.item()).astype(np.uint8)[..., None]
    return crop_and_resize(mask_HW1, one.boxes_B4[0], one.flips_B.item(), image_size)[..., 0] > 127
