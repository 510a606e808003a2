"""What a loader yields."""

# N samples, B batch, H height, W width, C channels

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.data.source import Source
from ccmim_fast.data.stream.plan import MicroBatch


class Batch(NamedTuple):
    """One micro-batch of one rank, on the training device.

    Attributes:
        images_BHWC: uint8, crops of `data.image_size`.
        ids_B: int64 sample ids: the index of each image in its source, the key of its mask.
        epochs_B: int64, the epoch each image is shown in, which keys its mask too; nearly always one.
        labels_B: int64 class indices, or None where the source has none.
        boxes_B4: float64, where the crop lies in its image: y, x, height, width as shares of the image's sides. Of a
            mirrored one x is its right edge in the image, and the width is negative.
        host_ids_B: the ids again, where the host can read them without waiting.
        maps_BGG: float16 maps of the scores so far, of a run with a score bank; see `bank`.
    """

    images_BHWC: Tensor
    ids_B: Tensor
    epochs_B: Tensor
    labels_B: Tensor | None = None
    boxes_B4: Tensor | None = None
    host_ids_B: np.ndarray | None = None
    maps_BGG: Tensor | None = None


def make_batch(images_BHWC: Tensor, shown: MicroBatch, source: Source, device: torch.device) -> Batch:
    """Put what belongs to the images on their device, without making the host wait for it."""
    ids_B = shown.ids_B
    of_images = [ids_B, shown.epochs_B] if source.labels_N is None else [ids_B, shown.epochs_B, source.labels_N[ids_B]]
    numbers = to_device(np.stack(of_images).astype(np.int64), device).unbind()
    labels_B = None if source.labels_N is None else numbers[2]
    return Batch(images_BHWC, *numbers[:2], labels_B, to_device(_shares(shown, source), device), ids_B)


def in_groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` micro-batches, the last one of what is left."""
    batches = iter(batches)
    while group := list(islice(batches, size)):
        yield group


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on `device`, in the order of its work."""
    tensor = torch.from_numpy(array)
    # Pinned memory alone is copied asynchronously.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _shares(shown: MicroBatch, source: Source) -> np.ndarray:
    """`Batch.boxes_B4`."""
    sizes_B2 = source.sizes_N2[shown.ids_B].astype(np.float64)
    boxes_B4 = shown.boxes_B4 / np.concatenate([sizes_B2, sizes_B2], axis=1)
    mirrored_B = shown.flips_B
    boxes_B4[mirrored_B, 1] += boxes_B4[mirrored_B, 3]
    boxes_B4[mirrored_B, 3] *= -1
    return boxes_B4
