"""What segmentation trains on: micro-batches of augmented images with their labels."""

# B batch, H height, W width

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.stream.plan import MicroBatch, Plan
from ccmim_fast.data.stream.prefetch import load_with_fallback, prefetch, thread_count
from ccmim_fast.evaluation.segmentation.scenes import Scenes
from ccmim_fast.evaluation.segmentation.transforms import Augment, Pair, pair_of


class Batch(NamedTuple):
    """images_BCHW: uint8. labels_BHW: uint8, `IGNORED` where there is no class."""

    images_BCHW: Tensor
    labels_BHW: Tensor


class Batches:
    """Training micro-batches of one rank.

    An image that cannot be decoded is replaced, see `load_with_fallback`; labels that are wrong end the run.

    Args:
        plan: what comes, and in which order; its source are `Scenes`.
        workers: decoding threads; 0: this rank's share of the cores.
    """

    def __init__(self, plan: Plan, bad_samples: BadSamples, augment: Augment, workers: int, device: torch.device):
        self._plan, self._bad_samples, self._augment = plan, bad_samples, augment
        self._threads, self._device = thread_count(workers), device

    def stream(self, cursor: int) -> Iterator[Batch]:
        """From a place of the stream on, without end; what comes depends on (seed, epoch, sample id) alone."""
        for _, pairs in prefetch(self._load, self._plan.micro_batches(cursor), self._threads):
            yield Batch(*(torch.stack(column).to(self._device) for column in zip(*pairs)))

    def _load(self, sample: MicroBatch) -> tuple[MicroBatch, Pair]:
        scenes: Scenes = self._plan.source
        decode = scenes.decode
        shown, image_HWC = load_with_fallback(
            lambda one: decode(one.ids_B.item()), sample, self._plan, self._bad_samples
        )
        index, epoch = shown.ids_B.item(), shown.epochs_B.item()
        draws = np.random.default_rng((self._plan.seed, epoch, index))
        return shown, self._augment(pair_of(scenes, index, image_HWC), draws)
