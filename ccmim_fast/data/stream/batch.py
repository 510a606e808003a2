"""This module makes the batches that a loader yields, in memory on the device."""

# N samples, B batch, H height, W width, C channels

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.data.source import Source
from ccmim_fast.data.stream.plan import MicroBatch


class Batch(NamedTuple):
    """A batch is one micro-batch of one rank, on the training device. Ids and epochs key the masks.

    `boxes_B4` is the position of the crop in its image: y, x, height, width as shares of the image's sides. For a
    mirrored crop, x is the right edge in the image and the width is negative.
    """

    images_BHWC: Tensor  # uint8 or float32, 255 for white, as the source's pixels; crops of `data.image_size`
    ids_B: Tensor  # int64 sample ids: the index of each image in its source
    epochs_B: Tensor  # int64, the epoch of each sample; nearly always one epoch for all
    labels_B: Tensor | None = None  # int64 class indices, or None if the source has none
    boxes_B4: Tensor | None = None  # float64
    host_ids_B: np.ndarray | None = None  # the ids again, on the host: reading them waits for no device
    maps_BGG: Tensor | None = None  # float16 maps of the scores so far, in a run with a score bank; see `bank`


def make_batch(images_BHWC: Tensor, samples: MicroBatch, source: Source, device: torch.device) -> Batch:
    """Add to the images what belongs to them, copied to the device without making the host wait."""
    ids_B = samples.ids_B
    boxes_B4 = samples.boxes_B4 / np.tile(source.sizes_N2[ids_B].astype(np.float64), 2)
    boxes_B4[samples.flips_B, 1] += boxes_B4[samples.flips_B, 3]
    boxes_B4[samples.flips_B, 3] *= -1
    labels_B = None if source.labels_N is None else source.labels_N[ids_B]
    return on_device(images_BHWC, ids_B, samples.epochs_B, labels_B, boxes_B4, device)


def on_device(
    images_BHWC: Tensor,
    ids_B: np.ndarray,
    epochs_B: np.ndarray,
    labels_B: np.ndarray | None,
    boxes_B4: np.ndarray,
    device: torch.device,
) -> Batch:
    """Make a batch of images that are on the device and of what belongs to them, which is copied there.

    Every batch that a compiled step takes is made here: one with other strides would compile another step.
    """
    columns = [ids_B, epochs_B] + ([] if labels_B is None else [labels_B])
    ids, epochs, *labels = to_device(np.stack(columns).astype(np.int64), device).unbind()
    return Batch(images_BHWC, ids, epochs, labels[0] if labels else None, to_device(boxes_B4, device), ids_B)


def in_groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Yield lists of `size` micro-batches; the last list holds the rest."""
    batches = iter(batches)
    while group := list(islice(batches, size)):
        yield group


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to `device`, in the order of the device's work."""
    tensor = torch.from_numpy(array)
    # Only pinned memory is copied asynchronously.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Buffers:
    """Buffers hold the images of a loader on the device, in tensors of one shape and type.

    On CUDA it is a ring of `2 * held` tensors, filled on a separate stream while a step reads earlier ones: a batch
    stays valid until `2 * held - 1` others were asked for. `held` batches, the micro-batches of a step, are asked for
    before the first of them is used. A copy waits for the work that was queued before the batch `held` positions behind
    it was asked for; of other work, only what reads the batch waits for the copy. On a CPU each batch has own memory.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, held: int):
        self._shape, self._dtype, self._device, self._held, self._asked = shape, dtype, device, held, 0
        if device.type == "cuda":
            self._slots = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2 * held)]
            self._asked_at: list[torch.cuda.Event | None] = [None] * (2 * held)
            self._stream = torch.cuda.Stream(device)

    def fill(self, copy: Callable[[Tensor, "torch.cuda.Stream | None"], object]) -> Tensor:
        """Return the next batch, written by `copy(tensor, stream)`, on CUDA in the order of that stream."""
        if self._device.type != "cuda":
            images_BHWC = torch.empty(self._shape, dtype=self._dtype)
            copy(images_BHWC, None)
            return images_BHWC
        current = torch.cuda.current_stream(self._device)
        slot = self._asked % len(self._slots)
        self._asked_at[slot] = current.record_event()
        # Batch k was last used before batch k + held was asked for; its memory is for batch k + 2 held.
        used = self._asked_at[(self._asked - self._held) % len(self._slots)]
        if used is not None:
            self._stream.wait_event(used)
        self._asked += 1
        with torch.cuda.stream(self._stream):
            copy(self._slots[slot], self._stream)
        current.wait_event(self._stream.record_event())
        return self._slots[slot]
