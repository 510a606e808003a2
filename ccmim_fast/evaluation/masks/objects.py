"""Scores and masks are compared with the objects in images, where their place is known."""

# B images, H height, W width, L patches

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.source import Source
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.data.stream.plan import MicroBatch
from ccmim_fast.data.stream.torch_loader import crop_and_resize
from ccmim_fast.engine.pretraining import Pretraining
from ccmim_fast.engine.step import StepResult
from ccmim_fast.errors import DataError, one_line
from ccmim_fast.evaluation.masks.metrics import object_leakage, object_patches, score_auroc

PROBED = 256  # images of a step at most: 26 ms of a core at 64 pixels a side, 143 ms at 224 (AMD EPYC)


def object_figures(run: Pretraining, batches: Sequence[Batch], result: StepResult) -> dict[str, float | None]:
    """Measure the first images of this rank's last micro-batch as the step divided them, without calling the model.

    Returns `auroc`, see `score_auroc`: None without scores, where they hold NaN, and where no image has both kinds of
    patches; and `leakage`, see `object_leakage`: None where no object is seen.
    """
    batch, seen, few = batches[-1], result.seen[-1], slice(0, PROBED)
    shown = run.loader.plan.micro_batch(batch.host_ids_B[few], batch.epochs_B[few].cpu().numpy())
    object_BL = objects_of(run.source, shown, run.config.data.image_size, run.model.patch)
    leakage = object_leakage(seen.mask_BL[few].cpu(), object_BL) if object_BL.any() else None
    return {"auroc": _auroc(seen.logits_BL, object_BL), "leakage": leakage}


def _auroc(logits_BL: Tensor | None, object_BL: Tensor) -> float | None:
    if logits_BL is None or not has_both(object_BL):
        return None
    logits_BL = logits_BL[: len(object_BL)].float().cpu()
    return None if logits_BL.isnan().any() else score_auroc(logits_BL, object_BL)


def has_both(object_BL: Tensor) -> bool:
    """Tell whether an image has both object and background patches."""
    return bool((object_BL.any(1) & ~object_BL.all(1)).any())


class MaskFolder:
    """This folder has object masks in PNG files, each under the name of its image; a pixel that is not 0 is object.

    The mask of `root`/a/b.jpg is `folder`/a/b.png, or else `folder`/b.png.
    """

    def __init__(self, folder: Path, root: str, source: Source):
        if not folder.is_dir():
            raise DataError(f"--masks={folder}: no such folder; name that of the PNG files")
        self._folder, self._root, self._source = folder, root, source

    def mask(self, index: int) -> np.ndarray:
        """Return the mask; raises DataError where it is missing, damaged, or of another size than its image."""
        name = self._source.name(index)
        whole = self._folder / Path(os.path.relpath(name, self._root)).with_suffix(".png")
        path = whole if whole.is_file() else self._folder / whole.name
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image)[..., : -1 if image.mode in ("LA", "RGBA") else None]
        except FileNotFoundError:
            raise DataError(f"--masks={self._folder}: no {path.name} in it, the mask of {name!r}") from None
        except Exception as error:  # Pillow's plugins raise whatever a damaged file leads them to
            raise DataError(f"{path}: no mask: {one_line(error)}") from None
        mask_HW = pixels != 0 if pixels.ndim == 2 else pixels.any(-1)
        size = tuple(self._source.sizes_N2[index].tolist())
        if mask_HW.shape != size:
            found, asked = (" x ".join(map(str, shape)) for shape in (mask_HW.shape, size))
            raise DataError(f"{path}: {found} pixels, its image has {asked}")
        return mask_HW


def objects_of(
    objects: ShapesSource | MaskFolder, shown: MicroBatch, image_size: tuple[int, int], patch: int
) -> Tensor:
    """Return which patches of the crops show the object, [B, L] bool."""
    crops = []
    for one in shown.samples():
        mask_HW1 = 255 * objects.mask(one.ids_B.item()).astype(np.uint8)[..., None]
        crops.append(crop_and_resize(mask_HW1, one.boxes_B4[0], one.flips_B.item(), image_size)[..., 0] > 127)
    return object_patches(torch.from_numpy(np.stack(crops)), patch)
