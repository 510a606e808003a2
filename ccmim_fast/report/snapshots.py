"""What the checkpoints of a run make of a few of its own images: scores, masks and reconstructions, after the fact."""

# B images, N samples, H height, W width, C channels, G cells per side of a map

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ccmim_fast.bank.warp import read
from ccmim_fast.build.model import build_model
from ccmim_fast.checkpoints import io
from ccmim_fast.config.load import from_yaml
from ccmim_fast.config.schema import Config, DataConfig
from ccmim_fast.data.build import build_source
from ccmim_fast.data.source import Source, usable_count, usable_ids
from ccmim_fast.data.stream.batch import Batch, make_batch
from ccmim_fast.data.stream.plan import MicroBatch
from ccmim_fast.data.stream.torch_loader import crop_and_resize
from ccmim_fast.errors import CcmimError, CheckpointError, DataError
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.scores import PriorScores

from .pictures import Snapshot
from .reconstruction import drawn


class Looks(NamedTuple):
    """Snapshots by epoch, and a line for each checkpoint that gave none."""

    snapshots: list[Snapshot]
    remarks: list[str]


class FewImages(NamedTuple):
    """Some images of a source, each its largest central crop of the shape that the model sees.

    Attributes:
        batch: them, on the CPU.
        shown: which part of which image each is.
        places_B: int64, their places among the usable samples.
        source: where they are from.
    """

    batch: Batch
    shown: MicroBatch
    places_B: np.ndarray
    source: Source


def look_back(folder: Path, images: int, moments: int, root: str = "") -> Looks:
    """Draw a few images by the checkpoints that the run in `folder` kept, on the CPU, whatever the run used.

    The images are spread over the run's data and the same at every checkpoint, and so is the noise of their masks (that
    of epoch 0): what changes is the model. A score bank is read as it was saved; of other images it knows nothing, and
    they are divided as at a first visit. Weights are those that were trained, not their average. Nothing in `folder`
    changes, so the run may be going on.

    Args:
        images: how many; an image that does not decode is left out.
        moments: checkpoints, spread from the oldest to the newest.
        root: take images from here, where the run's own are not at hand.
    """
    snapshots, remarks = [], []
    for path in spread(io.checkpoints(folder / "checkpoints"), moments):
        try:
            snapshots.append(_snapshot(io.load(path), images, root))
        except CcmimError as error:
            remarks.append(str(error))
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            remarks.append(f"{path}: is no checkpoint of this version: {reason}")
    return Looks(snapshots, list(dict.fromkeys(remarks)))


def spread(paths: Sequence[Path], count: int) -> list[Path]:
    """`count` of the paths at most, the first and the last among them; of one alone the last."""
    if count < 2 or len(paths) <= count:
        return list(paths[-count:]) if count else []
    return [paths[round(i * (len(paths) - 1) / (count - 1))] for i in range(count)]


@torch.inference_mode()
def _snapshot(state: dict[str, Any], count: int, root: str) -> Snapshot:
    config = anywhere(from_yaml(state["config"], "the checkpoint"))
    if root:
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, source="images", root=root, index="")
        )
    few = few_images(config.data, config.seed, count)
    model = restored(state, config)
    images_BHWC = few.batch.images_BHWC
    output = model(images_BHWC, few.batch.ids_B, 0, prior=known_of(model, state, few))
    drawn_BHWC = drawn(model, config, images_BHWC, output)
    return Snapshot(
        epoch_of(state),
        images_BHWC.numpy(),
        None if output.logits_BL is None else output.logits_BL.float().softmax(1).numpy(),
        output.partition.mask_BL.numpy(),
        None if drawn_BHWC is None else drawn_BHWC.numpy(),
    )


def anywhere(config: Config) -> Config:
    """A run's configuration with what runs anywhere in place of what needs its device."""
    train = dataclasses.replace(config.train, device="auto", kernels="reference", attention="auto", recompute=False)
    return dataclasses.replace(config, train=train)


def restored(state: dict[str, Any], config: Config) -> CCMIM:
    """The model of a checkpoint, in evaluation mode on the CPU; its weights as they were trained, not their average.

    Raises:
        CheckpointError: it is of another model than `config` says.
    """
    model = build_model(config)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the checkpoint is of another model: {reason}") from None
    return model.eval()


def epoch_of(state: dict[str, Any]) -> float:
    """Epochs that a checkpoint was trained; a whole number where they are whole. 0 of one that was imported."""
    epoch = round(state["progress"]["seen"] / max(state["progress"]["samples"], 1), 2)
    return int(epoch) if epoch == int(epoch) else epoch


def known_of(model: CCMIM, state: dict[str, Any], few: FewImages) -> PriorScores | None:
    """What the maps of a checkpoint say of the images; None where it has none, or they are of other images."""
    maps_NGG = state.get("maps")
    if not model.banked or maps_NGG is None or few.source.fingerprint != state["progress"]["images"]:
        return None
    return PriorScores(*read(maps_NGG[few.places_B], few.batch.boxes_B4, model.grid))


@lru_cache(maxsize=1)  # runs of one data set, one after the other, open it once
def few_images(data: DataConfig, seed: int, count: int) -> FewImages:
    """`count` images at most, spread over the source that `data` names.

    Raises:
        DataError: there is none, or none of those chosen decodes.
    """
    source = build_source(data, seed)
    places_B = np.unique(np.linspace(0, usable_count(source) - 1, count).round().astype(np.int64))
    found = []
    for place, index in zip(places_B, usable_ids(source, places_B)):
        try:
            image_HWC = source.decode(int(index))
        except DataError:
            continue
        box_4 = _central_box(image_HWC.shape[:2], data.image_size)
        found.append((crop_and_resize(image_HWC, box_4, False, data.image_size), place, index, box_4))
    if not found:
        raise DataError(f"data.root={data.root}: none of {len(places_B)} images that were to be drawn decodes")
    images_BHWC, places_B, ids_B, boxes_B4 = map(np.stack, zip(*found))
    shown = MicroBatch(ids_B, np.zeros_like(ids_B), boxes_B4, np.zeros(len(ids_B), dtype=bool))
    batch = make_batch(torch.from_numpy(images_BHWC), shown, source, torch.device("cpu"))
    return FewImages(batch, shown, places_B, source)


def _central_box(size: tuple[int, int], like: tuple[int, int]) -> np.ndarray:
    """The largest central box (y, x, height, width), int64, of the aspect of `like`."""
    scale = min(size[0] / like[0], size[1] / like[1])
    height, width = (max(1, int(side * scale)) for side in like)
    return np.array([(size[0] - height) // 2, (size[1] - width) // 2, height, width])
