"""What one rank loads, decided without touching an image: ids, epochs, boxes and flips of each micro-batch.

The samples are one endless stream, epoch after epoch, each epoch a keyed order of all of them. A run is at a place of
it, its cursor: the number of samples seen by all ranks. A step takes the next ones; it may begin in one epoch and end
in the next. So every sample comes once an epoch, whatever the batch, and nothing but the cursor is needed to go on,
with any number of ranks and any batch size.
"""

# P places, M micro-batches, B images of one micro-batch of one rank, A micro-batches per optimizer step, W ranks

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from ccmim_fast.data.crops import crop_boxes, flips
from ccmim_fast.data.order import epoch_order
from ccmim_fast.data.source import Source, usable, usable_ids
from ccmim_fast.errors import ConfigError, DataError
from ccmim_kernels.philox import STREAM_SUBSTITUTE, philox_4x32, stream_key

# Samples planned at once: 4 microseconds each, of 64 at once 41.
_TOGETHER = 1024


class MicroBatch(NamedTuple):
    """ids_B, epochs_B: int64 sample ids, and the epoch each is shown in. boxes_B4: int64 y, x, height, width of the
    crops. flips_B: bool, mirrored or not."""

    ids_B: np.ndarray
    epochs_B: np.ndarray
    boxes_B4: np.ndarray
    flips_B: np.ndarray

    def part(self, start: int, stop: int) -> "MicroBatch":
        """Some of its samples."""
        return MicroBatch(*(column[start:stop] for column in self))

    def samples(self) -> "list[MicroBatch]":
        """Each sample as a micro-batch of one."""
        return [self.part(i, i + 1) for i in range(len(self.ids_B))]

    @staticmethod
    def join(parts: "Iterable[MicroBatch]") -> "MicroBatch":
        """One micro-batch of all."""
        return MicroBatch(*map(np.concatenate, zip(*parts, strict=True)))


@dataclass(frozen=True)
class Plan:
    """The micro-batches of one rank; every loader carries out the same plan.

    Raises ConfigError or DataError where `global_batch` does not fit, see `check_batch`.
    """

    source: Source = field(repr=False)
    seed: int
    global_batch: int  # images per optimizer step, over all ranks and micro-batches
    accumulate: int = 1  # micro-batches per optimizer step
    rank: int = 0
    world_size: int = 1
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height
    flip: bool = False  # mirror left to right, p = 0.5
    window: int = 0  # samples shuffled among each other; 0: all

    def __post_init__(self) -> None:
        check_batch(self.samples, self.global_batch, self.accumulate, self.world_size)

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return usable(self.source)

    @property
    def micro_batch_size(self) -> int:
        """B, images of one micro-batch of one rank."""
        return self.global_batch // (self.accumulate * self.world_size)

    def micro_batches(self, cursor: int) -> Iterator[MicroBatch]:
        """`accumulate` micro-batches for each optimizer step, from the place `cursor` on, without end.

        A step takes the next `global_batch` places, each micro-batch a contiguous A-th of them, each rank a contiguous
        W-th of that: what a micro-batch holds does not depend on the number of ranks.
        """
        size, stride = self.micro_batch_size, self.micro_batch_size * self.world_size
        count = max(1, _TOGETHER // size)
        places_MB = cursor + self.rank * size + stride * np.arange(count)[:, None] + np.arange(size)
        while True:
            together = self.showing(*self.ids_at(places_MB.reshape(-1)))
            for start in range(0, count * size, size):
                yield together.part(start, start + size)
            places_MB += count * stride

    def ids_at(self, places_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and epochs, both [P] int64, at places of the stream."""
        epochs_P, places_P = np.divmod(places_P, self.samples)
        order_P = np.empty_like(places_P)
        for epoch in np.unique(epochs_P):
            here = epochs_P == epoch
            order_P[here] = epoch_order(self.seed, int(epoch), self.samples, places_P[here], self.window)
        return usable_ids(self.source, order_P), epochs_P

    def showing(self, ids_B: np.ndarray, epochs_B: np.ndarray) -> MicroBatch:
        """These samples with their crops and flips, which depend on (seed, epoch, id) alone."""
        sizes_B2 = self.source.sizes_N2[ids_B]
        boxes_B4 = crop_boxes(self.seed, epochs_B, ids_B, sizes_B2, self.crop_scale, self.crop_ratio)
        flips_B = flips(self.seed, epochs_B, ids_B) if self.flip else np.zeros(len(ids_B), dtype=bool)
        return MicroBatch(ids_B, epochs_B, boxes_B4, flips_B)

    def substitute(self, index: int, epoch: int, attempt: int) -> MicroBatch:
        """What is shown in the place of a sample that cannot be: one drawn by (seed, epoch, id, attempt) from all."""
        counters = (torch.tensor(c) for c in (attempt, index & 0xFFFFFFFF, index >> 32, epoch))
        high, low, _, _ = philox_4x32(stream_key(self.seed, STREAM_SUBSTITUTE), *counters)
        place = ((high.item() << 32) | low.item()) % self.samples
        return self.showing(usable_ids(self.source, np.array([place])), np.array([epoch]))


def check_batch(samples: int, global_batch: int, accumulate: int, world_size: int) -> None:
    """Return if each rank has an equal share of a step, and no step holds a sample twice.

    Raises:
        ConfigError: `global_batch` is no multiple of `accumulate` * `world_size`.
        DataError: there are fewer samples than one step takes.
    """
    share = accumulate * world_size
    if global_batch < 1 or global_batch % share:
        nearest = max(1, round(global_batch / share)) * share
        raise ConfigError(
            f"train.batch_size={global_batch} must be a multiple of {share} "
            f"(train.accumulate={accumulate} x {world_size} ranks); the nearest is {nearest}"
        )
    if samples < global_batch:
        largest = samples // share * share
        advice = f"set train.batch_size={largest} or less" if largest else f"at least {share} images are needed"
        raise DataError(f"{samples} images are fewer than train.batch_size={global_batch}; {advice}")
