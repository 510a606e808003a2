"""What one rank loads, decided without touching an image: ids, epochs, boxes and flips of each micro-batch.

The samples are one endless stream, epoch after epoch, each epoch a keyed order of all of them. A run is at a place of
it, its cursor: the number of samples seen by all ranks. A step takes the next ones; it may begin in one epoch and end
in the next. So every sample comes once an epoch, whatever the batch, and nothing but the cursor is needed to go on,
with any number of ranks and any batch size.

With shards, samples belong to ranks, so that what is kept of a sample is where the sample is trained on: usable sample
number n is of shard n % S, and an epoch shows equally many of each shard in turn, in an order of its own.

With repeats, an epoch of as many places shows the first samples of its order only, each several times in a row and each
time with another crop (repeated augmentation: Hoffer et al., 2020, as in DeiT).
"""

# P places, M micro-batches, B images of one micro-batch of one rank, A micro-batches per optimizer step, W ranks
# S shards

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from ccmim_fast.data.source import Source, usable, usable_ids
from ccmim_fast.data.stream.crops import crop_boxes, flips
from ccmim_fast.data.stream.permutation import epoch_order
from ccmim_fast.errors import ConfigError, DataError
from ccmim_kernels.philox import STREAM_SUBSTITUTE, philox_4x32, stream_key

# Samples planned at once: 4 microseconds each, of 64 at once 41.
_TOGETHER = 1024


class MicroBatch(NamedTuple):
    """ids_B, epochs_B: int64 sample ids, and the epoch each is shown in; with repeats, repeat r of epoch e counts as
    epoch e * repeats + r, so that all that is drawn of a sample is drawn anew. boxes_B4: int64 y, x, height, width of
    the crops. flips_B: bool, mirrored or not."""

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
    shards: int = 1  # parts of the samples, each of which belongs to some ranks
    repeats: int = 1  # times that a sample is shown in a row

    def __post_init__(self) -> None:
        check_batch(self.samples, self.global_batch, self.accumulate, self.world_size)
        check_shards(self.shards, self.global_batch // self.accumulate, self.world_size)

    @property
    def samples(self) -> int:
        """Samples of an epoch: of shards that have one more than others, one stays out, another one each time."""
        return usable(self.source) // self.shards * self.shards

    @property
    def own_shards(self) -> range:
        """Whose samples this rank trains on: several shards where there are more than ranks, else one."""
        own = max(1, self.shards // self.world_size)
        first = self.rank * self.shards // self.world_size
        return range(first, first + own)

    @property
    def micro_batch_size(self) -> int:
        """B, images of one micro-batch of one rank."""
        return self.global_batch // (self.accumulate * self.world_size)

    def micro_batches(self, cursor: int) -> Iterator[MicroBatch]:
        """`accumulate` micro-batches for each optimizer step, from the place `cursor` on, without end.

        A step takes the next `global_batch` places, each micro-batch a contiguous A-th of them, each rank a contiguous
        W-th of that in the order of its shards: what a micro-batch holds does not depend on the number of ranks.

        Args:
            cursor: a multiple of the number of shards, as every step's end is.
        """
        size = self.micro_batch_size
        count = max(1, _TOGETHER // size)
        while True:
            places_MB = self._places(cursor, count)[:, self.rank]
            together = self.showing(*self.ids_at(places_MB.reshape(-1)))
            for start in range(0, count * size, size):
                yield together.part(start, start + size)
            cursor += count * size * self.world_size

    def step_ids(self, cursor: int, ranks: range) -> np.ndarray:
        """Ids [A, R, B] int64 of the samples that the step at a place of the stream has for some ranks."""
        places_ARB = self._places(cursor, self.accumulate)[:, ranks.start : ranks.stop]
        return self.ids_at(places_ARB.reshape(-1))[0].reshape(places_ARB.shape)

    def _places(self, cursor: int, count: int) -> np.ndarray:
        """Places [count, W, B] of the stream that the next micro-batches take."""
        shape = (count, self.micro_batch_size, self.world_size)
        places_MXS = cursor + np.arange(np.prod(shape)).reshape(count, -1, self.shards)
        return places_MXS.swapaxes(1, 2).reshape(count, self.world_size, self.micro_batch_size)

    def ids_at(self, places_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and epochs, both [P] int64, at places of the stream; epochs as in `MicroBatch`."""
        epochs_P, places_P = np.divmod(places_P, self.samples)
        places_P, shards_P = np.divmod(places_P, self.shards)
        places_P, repeats_P = np.divmod(places_P, self.repeats)
        numbers_P, orders_P = np.empty_like(places_P), epochs_P * self.shards + shards_P
        for order in np.unique(orders_P):
            here, (epoch, shard) = orders_P == order, divmod(int(order), self.shards)
            among = -(-(usable(self.source) - shard) // self.shards)
            found_P = epoch_order(self.seed, epoch, among, places_P[here], self.window, shard)
            numbers_P[here] = found_P * self.shards + shard
        return usable_ids(self.source, numbers_P), epochs_P * self.repeats + repeats_P

    def showing(self, ids_B: np.ndarray, epochs_B: np.ndarray) -> MicroBatch:
        """These samples with their crops and flips, which depend on (seed, epoch, id) alone."""
        sizes_B2 = self.source.sizes_N2[ids_B]
        boxes_B4 = crop_boxes(self.seed, epochs_B, ids_B, sizes_B2, self.crop_scale, self.crop_ratio)
        flips_B = flips(self.seed, epochs_B, ids_B) if self.flip else np.zeros(len(ids_B), dtype=bool)
        return MicroBatch(ids_B, epochs_B, boxes_B4, flips_B)

    def substitute(self, index: int, epoch: int, attempt: int) -> MicroBatch:
        """What is shown in the place of a sample that cannot be: one of any shard, by (seed, epoch, id, attempt)."""
        counters = (torch.tensor(c) for c in (attempt, index & 0xFFFFFFFF, index >> 32, epoch))
        high, low, _, _ = philox_4x32(stream_key(self.seed, STREAM_SUBSTITUTE), *counters)
        place = ((high.item() << 32) | low.item()) % usable(self.source)
        return self.showing(usable_ids(self.source, np.array([place])), np.array([epoch]))


def check_batch(samples: int, global_batch: int, accumulate: int, world_size: int) -> None:
    """Return if each rank has an equal share of a step, and no step, but for repeats, holds a sample twice.

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


def check_shards(shards: int, together: int, world_size: int) -> None:
    """Return if each rank can have samples of its own: equally many of each of its shards in a micro-batch.

    Args:
        together: images of a micro-batch, over all ranks.

    Raises:
        ConfigError: shards and ranks do not divide each other, or not the micro-batch.
    """

    def fits(count: int) -> bool:
        return together % count == 0 and (world_size % count == 0 or count % world_size == 0)

    if not fits(shards):
        nearest = min(filter(fits, range(1, together + 1)), key=lambda count: abs(count - shards))
        raise ConfigError(
            f"score.shards={shards} must divide the {together} images of a micro-batch, and divide the {world_size} "
            f"ranks or be a multiple of them; the nearest is {nearest}"
        )
