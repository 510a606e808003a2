"""What one rank loads, decided without touching an image: ids, boxes and flips of each micro-batch."""

# N samples, B images of one micro-batch of one rank

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ccmim_fast.data.crops import crop_boxes, flips
from ccmim_fast.data.sampler import check_batch, epoch_order, rank_batches


class MicroBatch(NamedTuple):
    """ids_B: int64 sample ids. boxes_B4: int64 y, x, height, width of the crops. flips_B: bool, mirrored or not."""

    ids_B: np.ndarray
    boxes_B4: np.ndarray
    flips_B: np.ndarray


@dataclass(frozen=True)
class Plan:
    """The micro-batches of one rank; every loader carries out the same plan.

    Raises ConfigError or DataError where `global_batch` does not fit, see `check_batch`.
    """

    sizes_N2: np.ndarray = field(repr=False)  # int, height and width of every image
    seed: int
    global_batch: int  # images per optimizer step, over all ranks and micro-batches
    accumulate: int = 1  # micro-batches per optimizer step
    rank: int = 0
    world_size: int = 1
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height
    flip: bool = False  # mirror left to right, p = 0.5

    def __post_init__(self) -> None:
        check_batch(len(self.sizes_N2), self.global_batch, self.accumulate, self.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps; the samples left over by an incomplete last one are dropped."""
        return len(self.sizes_N2) // self.global_batch

    @property
    def micro_batch_size(self) -> int:
        """B, images of one micro-batch of one rank."""
        return self.global_batch // (self.accumulate * self.world_size)

    def micro_batches(self, epoch: int, start_step: int = 0) -> Iterator[MicroBatch]:
        """`accumulate` micro-batches for each optimizer step from `start_step` to the end of the epoch."""
        order_N = epoch_order(self.seed, epoch, len(self.sizes_N2))
        for step in range(start_step, self.steps_per_epoch):
            for ids_B in rank_batches(order_N, step, self.global_batch, self.accumulate, self.rank, self.world_size):
                yield self._crop(epoch, ids_B)

    def _crop(self, epoch: int, ids_B: np.ndarray) -> MicroBatch:
        boxes_B4 = crop_boxes(self.seed, epoch, ids_B, self.sizes_N2[ids_B], self.crop_scale, self.crop_ratio)
        flips_B = flips(self.seed, epoch, ids_B) if self.flip else np.zeros(len(ids_B), dtype=bool)
        return MicroBatch(ids_B, boxes_B4, flips_B)
