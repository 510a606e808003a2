"""Micro-batches of a rank: images and targets to train on, and its share of the images to test on."""

# B batch, N images of a share, C channels, H height, W width

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.source import usable_count, usable_ids
from ccmim_fast.data.stream.plan import MicroBatch, Plan
from ccmim_fast.data.stream.prefetch import load_with_fallback
from ccmim_fast.evaluation.detection.instances import Instances, InstanceSource
from ccmim_fast.evaluation.detection.transforms import ForTesting, ForTraining, Sample
from ccmim_fast.evaluation.job import Job
from ccmim_fast.evaluation.processes import prepared
from ccmim_fast.evaluation.supervised import seed_generators


class MicroBatchOfObjects(NamedTuple):
    """What torchvision's detectors take in training: images [C, H, W] in 0..1, of any sizes, and a target for each."""

    images: list[Tensor]
    targets: list[dict[str, Tensor]]


class Shown(NamedTuple):
    """An image to test on, uint8 [C, H, W] in the size in which it is shown, and what is known of the original."""

    image_CHW: Tensor
    objects: Instances


class _Prepared(Dataset):
    """A micro-batch of one -> `Sample`; draws are keyed by (seed, epoch, sample id)."""

    def __init__(self, plan: Plan, bad_samples: BadSamples, transform: ForTraining, seed: int):
        self._plan, self._bad_samples, self._transform, self._seed = plan, bad_samples, transform, seed

    def __getitem__(self, sample: MicroBatch) -> Sample:
        return load_with_fallback(self._load, sample, self._plan, self._bad_samples)[1]

    def _load(self, sample: MicroBatch) -> Sample:
        index = sample.ids_B.item()
        image_HWC, objects = self._plan.source.decode(index), self._plan.source.instances(index)
        seed_generators(self._seed, sample.epochs_B.item(), index)
        return self._transform(image_HWC, objects)


class Batches:
    """Training batches of one rank."""

    def __init__(self, job: Job):
        config, source = job.config, job.train.source
        self._config, self._here = config, job.here
        self._plan = Plan(
            source, config.seed, config.train.batch_size, config.train.accumulate, job.here.rank, job.here.world_size
        )
        # What is excluded is not bad: there is no object in it.
        bad_samples = BadSamples(None, len(source), 0, config.data.on_error, config.data.max_bad)
        self._samples = _Prepared(self._plan, bad_samples, ForTraining(config, job.weights.mean), config.seed)

    def stream(self, cursor: int) -> Iterator[MicroBatchOfObjects]:
        """From a place of the stream on, without end; prepared by other processes where there is more than one core."""
        batches = (batch.samples() for batch in self._plan.micro_batches(cursor))
        for samples in prepared(self._samples, batches, list, self._config.data.workers, self._here.device):
            images, targets = zip(*(_on_device(sample, self._here.device) for sample in samples))
            yield MicroBatchOfObjects(list(images), list(targets))


def _on_device(sample: Sample, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """The image as shares of 1, and its target, on the device."""
    target = {name: value.to(device, non_blocking=True) for name, value in sample.target.items()}
    return sample.image_CHW.to(device, non_blocking=True) / 255, target


class _Share(Dataset):
    """Of the usable images every `step`-th from `first` on."""

    def __init__(self, source: InstanceSource, transform: ForTesting, first: int, step: int):
        self._source, self._transform = source, transform
        self._ids_N = usable_ids(source, np.arange(first, usable_count(source), step))

    def __len__(self) -> int:
        return len(self._ids_N)

    def __getitem__(self, place: int) -> Shown:
        index = int(self._ids_N[place])
        return Shown(self._transform(self._source.decode(index)), self._source.instances(index))


def share_to_test(job: Job) -> Iterator[list[Shown]]:
    """This rank's share, every `world_size`-th image once, some at a time. Raises DataError naming a bad image."""
    train = job.config.train
    share = _Share(job.test.source, ForTesting(job.config), job.here.rank, job.here.world_size)
    size = max(1, train.batch_size // (train.accumulate * job.here.world_size))
    places = (list(range(first, min(first + size, len(share)))) for first in range(0, len(share), size))
    return prepared(share, places, list, job.config.data.workers, job.here.device)
