"""Snapshots of a run are taken after the fact: its checkpoints score, mask and reconstruct a few of its images."""

# B batch, H height, W width, C channels, L patches, M masked, P patch * patch * C

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.bank.bank import read_maps
from ccmim_fast.build.model import build_objective
from ccmim_fast.checkpoints.manifest import CHECKPOINTS, checkpoints
from ccmim_fast.checkpoints.run import OpenedRun, open_run
from ccmim_fast.config.schema import Config, DataConfig
from ccmim_fast.data.build import build_source
from ccmim_fast.data.index.index_file import Index
from ccmim_fast.data.index.storage import is_remote
from ccmim_fast.data.source import Source, usable_count, usable_ids
from ccmim_fast.data.stream.batch import Batch, make_batch
from ccmim_fast.data.stream.plan import MicroBatch
from ccmim_fast.data.stream.torch_loader import central_boxes, load_crop
from ccmim_fast.errors import CcmimError, CheckpointError, DataError, one_line
from ccmim_fast.losses.criteria import Pixels
from ccmim_fast.models.ccmim import CCMIM, Output
from ccmim_fast.models.scores import PriorScores
from ccmim_kernels import NORM_PIX_EPS, Partition, patchify, unpatchify

from .pictures import Snapshot


class FewImages(NamedTuple):
    """This tuple holds a few images of a source, each its largest central crop of the shape that the model sees."""

    batch: Batch  # on the CPU
    shown: MicroBatch  # the part of the image that each is
    places_B: np.ndarray  # int64, places among the usable samples
    source: Source


def take_snapshots(folder: Path, images: int, moments: int, root: str = "") -> tuple[list[Snapshot], list[str]]:
    """Draw `images` images by `moments` checkpoints that the run in `folder` kept, on the CPU, whatever the run used.

    The images are spread over the run's data (or those at `root`) and the same at every checkpoint, and so is the noise
    of their masks (that of epoch 0): what changes is the model. A score bank is read as it was saved; of other images
    it knows nothing, and they are divided as at a first visit. Weights are averaged where the run has averages. An
    image that does not decode is left out. Nothing in `folder` changes, so the run may be going on.

    Returns the snapshots by epoch, and a line for each checkpoint that gave none.
    """
    snapshots, remarks = [], []
    for path in spread(checkpoints(folder / CHECKPOINTS), moments):
        try:
            snapshots.append(_snapshot(open_run(path), images, root))
        except CcmimError as error:
            remarks.append(str(error))
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            reason = one_line(f"{type(error).__name__}: {error}")
            remarks.append(f"{path}: is no checkpoint of this version: {reason}")
    return snapshots, list(dict.fromkeys(remarks))


def spread(paths: Sequence[Path], count: int) -> list[Path]:
    """Choose at most `count` of the paths, the first and the last among them; of one alone the last."""
    if count < 2 or len(paths) <= count:
        return list(paths[-count:]) if count else []
    return [paths[round(i * (len(paths) - 1) / (count - 1))] for i in range(count)]


@torch.inference_mode()
def _snapshot(run: OpenedRun, count: int, root: str) -> Snapshot:
    config, model = run.config, run.model
    data = dataclasses.replace(config.data, source="images", root=root, index="") if root else own_images(config.data)
    few = few_images(data, config.seed, count)
    images_BHWC = few.batch.images_BHWC
    output = model(images_BHWC, few.batch.ids_B, 0, prior=prior_scores(run, few))
    scores_BL = None if output.logits_BL is None else output.logits_BL.float().softmax(1).numpy()
    drawn_BHWC = reconstruct(model, config, images_BHWC, output)
    seen_BHWC = on_screen(images_BHWC, model.mean_C, model.std_C).numpy()
    return Snapshot(run.epoch, seen_BHWC, scores_BL, output.partition.mask_BL.numpy(), drawn_BHWC)


def own_images(data: DataConfig) -> DataConfig:
    """Return where a run has its images, so that whoever looks at it writes at no place that the run names.

    Somebody else may have made the run. Its index is used if it is there, and is an index of these images; made images
    are drawn without their cache. Raises DataError for a URL, which nobody asks but by the user's word.
    """
    if data.source != "images":
        return dataclasses.replace(data, root="")
    if is_remote(data.root):
        raise DataError(f"the run's images are at {data.root!r:.200}; they are asked for if you name the URL yourself")
    with suppress(DataError):
        if data.index and Index(data.index).origin == data.root:
            return data
    return dataclasses.replace(data, index="")


def prior_scores(run: OpenedRun, few: FewImages) -> PriorScores | None:
    """Read the score bank of a run at the images; None where it has none, or its maps are of other images."""
    model, maps_NGG = run.model, run.maps_NGG
    if not model.banked or maps_NGG is None or few.source.fingerprint != run.images:
        return None
    if maps_NGG.ndim != 3 or len(maps_NGG) != usable_count(few.source):
        raise CheckpointError(f"{run.path}: its bank has maps of shape {list(maps_NGG.shape)}, not one for each image")
    return PriorScores(*read_maps(maps_NGG[few.places_B], few.batch.boxes_B4, model.grid))


@lru_cache(maxsize=1)  # runs of one data set, one after the other, open it once
def few_images(data: DataConfig, seed: int, count: int) -> FewImages:
    """Decode at most `count` images, spread over the source that `data` names. Raises DataError: none decodes."""
    source = build_source(data, seed)
    places_B = np.unique(np.linspace(0, usable_count(source) - 1, count).round().astype(np.int64))
    ids_B = usable_ids(source, places_B)
    boxes_B4 = central_boxes(source.sizes_N2[ids_B].astype(np.int64), data.image_size)
    shown = MicroBatch(ids_B, np.zeros_like(ids_B), boxes_B4, np.zeros(len(ids_B), dtype=bool))
    images, kept = [], []
    for i, sample in enumerate(shown.samples()):
        with suppress(DataError):
            images.append(load_crop(source, sample, data.image_size))
            kept.append(i)
    if not kept:
        raise DataError(f"data.root={data.root}: none of {len(places_B)} images that were to be drawn decodes")
    shown = MicroBatch(*(part_B[kept] for part_B in shown))
    batch = make_batch(torch.from_numpy(np.stack(images)), shown, source, torch.device("cpu"))
    return FewImages(batch, shown, places_B[kept], source)


def reconstruct(model: CCMIM, config: Config, images_BHWC: Tensor, output: Output) -> np.ndarray | None:
    """Return the images with their masked patches as the model predicts them; None where it predicts no pixels."""
    target = build_objective(config, model).reconstruction
    if not isinstance(target, Pixels):
        return None
    return paste_prediction(target, images_BHWC, output.pred_BMP, output.partition).cpu().numpy()


def paste_prediction(target: Pixels, images_BHWC: Tensor, pred_BMP: Tensor, partition: Partition) -> Tensor:
    """Replace the masked patches of images by pixel predictions, in the order of `partition.ids_masked_BM`.

    With `target.norm_pix` the prediction knows neither mean nor variance of a patch; both are taken from the patch
    itself, so what the picture shows of them was not reconstructed. Returns [B, H, W, C] uint8.
    """
    H, W = images_BHWC.shape[1:3]
    mean_P, std_P = (value_C.float().repeat(target.patch**2) for value_C in (target.mean_C, target.std_C))
    patches_BLP = (patchify(images_BHWC, target.patch).float() / 255 - mean_P) / std_P
    index_BMP = partition.ids_masked_BM[..., None].expand(-1, -1, patches_BLP.shape[-1])
    pixels_BMP = pred_BMP.float()
    if target.norm_pix:
        true_BMP = patches_BLP.gather(1, index_BMP)
        spread_BM1 = (true_BMP.var(-1, keepdim=True) + NORM_PIX_EPS).sqrt()
        pixels_BMP = pixels_BMP * spread_BM1 + true_BMP.mean(-1, keepdim=True)
    patches_BLP = patches_BLP.scatter(1, index_BMP, pixels_BMP)
    images = unpatchify((patches_BLP * std_P + mean_P) * 255, target.patch, H, W)
    if images_BHWC.is_floating_point():
        return on_screen(images, target.mean_C, target.std_C)
    return images.round().clamp(0, 255).to(torch.uint8)


def on_screen(images_BHWC: Tensor, mean_C: Tensor, std_C: Tensor) -> Tensor:
    """Return images as uint8, to be drawn: of float32 ones, three deviations on both sides of the mean are seen."""
    if not images_BHWC.is_floating_point():
        return images_BHWC
    deviations_BHWC = (images_BHWC / 255 - mean_C.float()) / std_C.float()
    return (127.5 + 42.5 * deviations_BHWC).round().clamp(0, 255).to(torch.uint8)
