"""A plan tells the ids, epochs, boxes and flips of each micro-batch of one rank, without touching an image.

The samples form one endless stream, epoch after epoch, each epoch a keyed permutation of all samples. A run's position
in it is its cursor: the number of samples that all ranks have seen. A step takes the next samples, across the end of an
epoch too. Every sample therefore comes once an epoch, whatever the batch size, and the cursor is all that a resumed run
needs, with any number of ranks and any batch size.

With partitions, samples belong to ranks, so that what is kept of a sample stays where the sample is trained on: usable
sample number n is in partition n % S. An epoch takes as many samples of each partition, in turn, each in its own order.

With repeats, an epoch of the same length takes only the first samples of its order, each several times in a row with
different crops (repeated augmentation: Hoffer et al., 2020, as in DeiT).
"""

# P positions, M micro-batches, B images of one micro-batch of one rank, A micro-batches per optimizer step, W ranks
# S partitions

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch

from ccmim_fast.data.source import Source, usable_count, usable_ids
from ccmim_fast.data.stream.crops import crop_boxes, flips
from ccmim_fast.data.stream.permutation import epoch_order
from ccmim_fast.errors import ConfigError, DataError
from ccmim_kernels.philox import STREAM_FALLBACK, philox_4x32, stream_key

_PLANNED_AT_ONCE = 1024  # samples: 4 microseconds each; with 64 at once 41


class MicroBatch(NamedTuple):
    """A micro-batch names samples and their crops.

    Repeat r of epoch e counts as epoch e * repeats + r, so that every random number of a sample is drawn anew.
    """

    ids_B: np.ndarray  # int64 sample ids
    epochs_B: np.ndarray  # int64
    boxes_B4: np.ndarray  # int64 y, x, height, width of the crops in pixels
    flips_B: np.ndarray  # bool, mirrored or not

    def part(self, start: int, stop: int) -> "MicroBatch":
        """Return the samples from `start` to `stop`."""
        return MicroBatch(*(column[start:stop] for column in self))

    def samples(self) -> "list[MicroBatch]":
        """Return each sample as a micro-batch of one."""
        return [self.part(i, i + 1) for i in range(len(self.ids_B))]

    @staticmethod
    def join(parts: "Iterable[MicroBatch]") -> "MicroBatch":
        """Concatenate micro-batches."""
        return MicroBatch(*map(np.concatenate, zip(*parts, strict=True)))


@dataclass(frozen=True)
class Plan:
    """A plan describes one rank's micro-batches, for every loader. Raises as `check_batch` and `check_partitions`."""

    source: Source = field(repr=False)
    seed: int
    global_batch: int  # images per optimizer step, over all ranks and micro-batches
    accumulate: int = 1  # micro-batches per optimizer step
    rank: int = 0
    world_size: int = 1
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height
    crop_rule: Literal["torchvision", "mae"] = "torchvision"  # of crops that do not fit, see `crop_boxes`
    flip: bool = False  # mirror left to right, p = 0.5
    window: int = 0  # samples shuffled among each other; 0: all
    partitions: int = 1  # parts of the samples, each of which belongs to some ranks
    repeats: int = 1  # times that a sample comes in a row

    def __post_init__(self) -> None:
        check_batch(self.samples, self.global_batch, self.accumulate, self.world_size)
        check_partitions(self.partitions, self.global_batch // self.accumulate, self.world_size)

    @property
    def samples(self) -> int:
        """Count the samples of an epoch; a partition with one more than others leaves out a different one each time."""
        return usable_count(self.source) // self.partitions * self.partitions

    @property
    def own_partitions(self) -> range:
        """Return the partitions that this rank trains on: several if there are more partitions than ranks, else one."""
        own = max(1, self.partitions // self.world_size)
        first = self.rank * self.partitions // self.world_size
        return range(first, first + own)

    @property
    def micro_batch_size(self) -> int:
        """Return B, the images of one micro-batch of one rank."""
        return self.global_batch // (self.accumulate * self.world_size)

    def micro_batches(self, cursor: int) -> Iterator[MicroBatch]:
        """Yield `accumulate` micro-batches for each optimizer step, without end, from the position `cursor` on.

        A step takes the next `global_batch` positions, each micro-batch a contiguous A-th of them, each rank a
        contiguous W-th of that in the order of its partitions: the number of ranks does not change a micro-batch.
        `cursor` is a multiple of the number of partitions, as the end of every step is.
        """
        size = self.micro_batch_size
        count = max(1, _PLANNED_AT_ONCE // size)
        while True:
            positions_MB = self._positions(cursor, count)[:, self.rank]
            planned = self.micro_batch(*self.ids_at(positions_MB.reshape(-1)))
            for start in range(0, count * size, size):
                yield planned.part(start, start + size)
            cursor += count * size * self.world_size

    def step_ids(self, cursor: int, ranks: range) -> np.ndarray:
        """Return the ids [A, R, B] int64 of the samples that some ranks have in the step at `cursor`."""
        positions_ARB = self._positions(cursor, self.accumulate)[:, ranks.start : ranks.stop]
        return self.ids_at(positions_ARB.reshape(-1))[0].reshape(positions_ARB.shape)

    def _positions(self, cursor: int, count: int) -> np.ndarray:
        """Return the positions [count, W, B] of the stream that the next micro-batches take."""
        shape = (count, self.micro_batch_size, self.world_size)
        positions_MXS = cursor + np.arange(np.prod(shape)).reshape(count, -1, self.partitions)
        return positions_MXS.swapaxes(1, 2).reshape(count, self.world_size, self.micro_batch_size)

    def ids_at(self, positions_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids and epochs, both [P] int64, at positions of the stream; epochs as in `MicroBatch`."""
        epochs_P, positions_P = np.divmod(positions_P, self.samples)
        positions_P, partitions_P = np.divmod(positions_P, self.partitions)
        positions_P, repeats_P = np.divmod(positions_P, self.repeats)
        usable_P, orders_P = np.empty_like(positions_P), epochs_P * self.partitions + partitions_P
        for order in np.unique(orders_P):
            here, (epoch, partition) = orders_P == order, divmod(int(order), self.partitions)
            count = -(-(usable_count(self.source) - partition) // self.partitions)
            found_P = epoch_order(self.seed, epoch, count, positions_P[here], self.window, partition)
            usable_P[here] = found_P * self.partitions + partition
        return usable_ids(self.source, usable_P), epochs_P * self.repeats + repeats_P

    def micro_batch(self, ids_B: np.ndarray, epochs_B: np.ndarray) -> MicroBatch:
        """Add crops and flips to samples; both depend on (seed, epoch, id) alone."""
        sizes_B2 = self.source.sizes_N2[ids_B]
        boxes_B4 = crop_boxes(self.seed, epochs_B, ids_B, sizes_B2, self.crop_scale, self.crop_ratio, self.crop_rule)
        flips_B = flips(self.seed, epochs_B, ids_B) if self.flip else np.zeros(len(ids_B), dtype=bool)
        return MicroBatch(ids_B, epochs_B, boxes_B4, flips_B)

    def fallback(self, index: int, epoch: int, attempt: int) -> MicroBatch:
        """Return the sample that replaces a bad one, drawn from all partitions by (seed, epoch, id, attempt)."""
        counters = (torch.tensor(c) for c in (attempt, index & 0xFFFFFFFF, index >> 32, epoch))
        high, low, _, _ = philox_4x32(stream_key(self.seed, STREAM_FALLBACK), *counters)
        position = ((high.item() << 32) | low.item()) % usable_count(self.source)
        return self.micro_batch(usable_ids(self.source, np.array([position])), np.array([epoch]))


def check_batch(samples: int, global_batch: int, accumulate: int, world_size: int) -> None:
    """Return if each rank has an equal share of a step, and no step, without repeats, holds a sample twice.

    Raises ConfigError for a `global_batch` that cannot be divided, DataError for one larger than the set.
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


def check_partitions(partitions: int, images: int, world_size: int) -> None:
    """Return if each rank can have its own samples: equally many of each of its partitions in a micro-batch.

    Raises ConfigError if partitions and ranks do not divide each other, or the `images` of a micro-batch of all ranks.
    """

    def fits(count: int) -> bool:
        return images % count == 0 and (world_size % count == 0 or count % world_size == 0)

    if not fits(partitions):
        nearest = min(filter(fits, range(1, images + 1)), key=lambda count: abs(count - partitions))
        raise ConfigError(
            f"score.shards={partitions} must divide the {images} images of a micro-batch, and divide the "
            f"{world_size} ranks or be a multiple of them; the nearest is {nearest}"
        )
