"""Scores and masks are compared with the objects in images, where their place is known."""

# B images, H height, W width, L patches (row by row), P patch side

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.data.index.formats import open_picture
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.source import Source
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.data.stream.plan import MicroBatch
from ccmim_fast.data.stream.torch_loader import crop_and_resize
from ccmim_fast.engine.pretraining import Pretraining
from ccmim_fast.engine.step import StepResult
from ccmim_fast.errors import DataError, one_line

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
        size = tuple(self._source.sizes_N2[index].tolist())
        try:
            with open_picture(path) as image:
                found = image.size[::-1]
                # Read only if it is as large as its image.
                pixels = (
                    np.asarray(image)[..., : -1 if image.mode in ("LA", "RGBA") else None] if found == size else None
                )
        except FileNotFoundError:
            raise DataError(f"--masks={self._folder}: no {path.name} in it, the mask of {name!r}") from None
        except Exception as error:  # Pillow's plugins raise whatever a damaged file leads them to
            raise DataError(f"{path}: no mask: {one_line(error)}") from None
        if pixels is None:
            given, asked = (" x ".join(map(str, shape)) for shape in (found, size))
            raise DataError(f"{path}: {given} pixels, its image has {asked}")
        mask_HW = pixels != 0 if pixels.ndim == 2 else pixels.any(-1)
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


def object_patches(masks_BHW: Tensor, patch: int) -> Tensor:
    """Turn masks (bool, True on the object) into patch masks [B, L]: a patch is object where at least half of it is.

    Raises ValueError: `patch`, its side in pixels, does not divide both sides.
    """
    B, H, W = masks_BHW.shape
    if patch < 1 or H % patch or W % patch:
        raise ValueError(f"patch={patch} must divide the image's {H} x {W} pixels")
    blocks_BhPwP = masks_BHW.view(B, H // patch, patch, W // patch, patch)
    return (2 * blocks_BhPwP.sum(dim=(2, 4)) >= patch**2).flatten(1)


def score_auroc(scores_BL: Tensor, object_BL: Tensor) -> float:
    """Return the mean over images of the AUROC of patch scores, of any scale, against object patches (bool).

    Of one image it is the share of (object, background) pairs in which the object patch scores higher, a tie counting
    one half: 1 = every object patch above every other patch, 0.5 = no relation. It is computed from ranks
    (Mann-Whitney). Images with no object patch, or with nothing else, are left out. Raises ValueError: NaN in the
    scores, or no image with both kinds of patches.
    """
    if scores_BL.isnan().any():
        raise ValueError("scores hold NaN")
    objects_B, others_B = object_BL.sum(dim=1), (~object_BL).sum(dim=1)
    usable_B = (objects_B > 0) & (others_B > 0)
    if not usable_B.any():
        raise ValueError(f"none of {len(scores_BL)} images has both object and background patches")
    scores_BL = scores_BL.contiguous()
    sorted_BL = scores_BL.sort(dim=1).values
    below_BL, not_above_BL = (torch.searchsorted(sorted_BL, scores_BL, right=right) for right in (False, True))
    # The rank, from 1, of a tied group is the mean of its places.
    rank_sum_B = ((below_BL + not_above_BL + 1).double() / 2 * object_BL).sum(dim=1)
    auroc_B = (rank_sum_B - objects_B * (objects_B + 1) / 2) / (objects_B * others_B)
    return float(auroc_B[usable_B].mean())


def object_leakage(mask_BL: Tensor, object_BL: Tensor) -> float:
    """Return the share of all object patches that stay visible, relative to the share of all patches that do.

    1 = as many as random masking leaves, 0 = every object patch hidden, 1 / (1 - ratio) = every one visible. Masks are
    bool, True where masked. Raises ValueError: no patch is visible, or none shows an object.
    """
    if mask_BL.all() or not object_BL.any():
        which = "a visible patch" if mask_BL.all() else "an object patch"
        raise ValueError(f"none of {len(object_BL)} images has {which}")
    visible_BL = ~mask_BL
    return float(visible_BL[object_BL].double().mean() / visible_BL.double().mean())
