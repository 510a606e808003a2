"""Micro-batches that other processes prepare, sample by sample: what evaluations train on, and what they test on."""

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.source import usable_count, usable_ids
from ccmim_fast.data.stream.plan import MicroBatch, Plan
from ccmim_fast.data.stream.prefetch import load_with_fallback
from ccmim_fast.data.threads import thread_count
from ccmim_fast.errors import CcmimError, DataError
from ccmim_fast.evaluation.job import Job

_SHARED = 2**30  # bytes of /dev/shm: Docker gives 64 MB, a batch of 1024 images takes 150 MB
_AHEAD = 1  # micro-batches of each process: as large as a step's, and there are as many of them as processes


class SampleLoader:
    """Training micro-batches of one rank; a `Loader`. A subclass says what a sample is.

    An image that `read` cannot give is replaced, see `load_with_fallback`. What comes is to depend on (seed, epoch,
    sample id) alone, not on the process that makes it.
    """

    def __init__(self, job: Job, repeats: int = 1):
        source, train, data = job.train.source, job.config.train, job.config.data
        self.config, self.here = job.config, job.here
        parts = (train.batch_size, train.accumulate, job.here.rank, job.here.world_size)
        self.plan = Plan(source, job.config.seed, *parts, repeats=repeats)
        self.bad_samples = BadSamples(source, data.on_error, data.max_bad)

    def read(self, index: int) -> Any:
        """Return an image, and what is known of it; raises DataError where that cannot be had."""
        return self.plan.source.decode(index)

    def make(self, read: Any, index: int, epoch: int) -> Any:
        """Return a sample of what was read, augmented by draws keyed by (seed, epoch, sample id)."""
        raise NotImplementedError

    def collate(self, samples: list) -> Any:
        """Return the micro-batch of some samples, on the host."""
        return default_collate(samples)

    def place(self, batch: Any, number: int) -> Any:
        """Return the micro-batch on the device; `number` counts those of this rank from the start of the run."""
        return type(batch)(*(part.to(self.here.device, non_blocking=True) for part in batch))

    def stream(self, cursor: int) -> Iterator[Any]:
        """Yield micro-batches from a place of the stream on, without end; see `Loader`."""
        keys = (batch.samples() for batch in self.plan.micro_batches(cursor))
        number = cursor // self.plan.global_batch * self.plan.accumulate
        for batch, reasons in prepared(self._sample, keys, self._collate, self.config.data.workers, self.here.device):
            # Processes keep account of their own; they have written it down for the next run.
            for sample, reason in reasons.items():
                self.bad_samples.add(sample, reason, lasting=False)
            yield self.place(batch, number)
            number += 1

    def _sample(self, sample: MicroBatch) -> Any:
        """Return the sample that a micro-batch of one asks for, or its substitute."""
        shown, read = load_with_fallback(lambda one: self.read(one.ids_B.item()), sample, self.plan, self.bad_samples)
        return self.make(read, shown.ids_B.item(), shown.epochs_B.item())

    def _collate(self, samples: list) -> tuple[Any, dict[int, str]]:
        return self.collate(samples), dict(self.bad_samples.reasons)


def samples_to_test(job: Job, read: Callable[[int], Any]) -> Iterator[list[Any]]:
    """Yield what `read` gives of this rank's share of the test images, every `world_size`-th once, some at a time.

    Where `read` raises DataError the image is left out, and recorded in `job.test.bad`.
    """
    here, train, source = job.here, job.config.train, job.test.source
    ids = usable_ids(source, np.arange(here.rank, usable_count(source), here.world_size)).tolist()
    size = max(1, train.batch_size // (train.accumulate * here.world_size))
    batches = (ids[first : first + size] for first in range(0, len(ids), size))

    def tried(index: int) -> Any:
        try:
            return read(index)
        except DataError as error:
            return _Failed(index, str(error))

    for found in prepared(tried, batches, list, job.config.data.workers, here.device):
        here.watchdog.enter_phase("evaluating the model")
        for one in found:
            if isinstance(one, _Failed):
                job.test.bad.add(one.index, one.reason, lasting=False)
        if samples := [one for one in found if not isinstance(one, _Failed)]:
            yield samples


class _Failed(NamedTuple):
    index: int
    reason: str


def prepared(
    make: Callable[[Any], Any],
    batches: Iterable[list],
    collate: Callable[[list], Any],
    workers: int,
    device: torch.device,
) -> Iterator[Any]:
    """Yield what `collate` makes of the samples of each batch, in order.

    `make` turns a key into a sample; it and `collate` run in `workers` processes (1: in this one; 0: see
    `thread_count`). The next batch of keys is asked for no further ahead than one a process. On their way to a `device`
    "cuda" batches are in pinned memory. Raises CcmimError: a sample's own, with its message alone, when its batch has
    its turn.
    """
    workers = thread_count(workers)
    workers = 0 if workers == 1 else workers
    loader = DataLoader(
        _WholeBatches(make, collate, pickled=workers > 0 and shared_memory_is_small()),
        batch_size=None,
        sampler=batches,
        collate_fn=lambda batch: batch,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        if isinstance(batch, bytes):
            batch = pickle.loads(batch)
        if isinstance(batch, CcmimError):
            raise batch
        yield batch


def shared_memory_is_small() -> bool:
    """Return whether tensors of processes might not fit into /dev/shm, where a write beyond its end kills a process."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:  # another system, with another limit
        return False
    return found.f_bavail * found.f_frsize < _SHARED


class _WholeBatches(Dataset):
    """Keys of a batch -> the batch, or the user's error: raised in a process, torch would put its traceback first.

    `pickled` makes bytes of it, which go through a pipe; tensors go through shared memory.
    """

    def __init__(self, make: Callable[[Any], Any], collate: Callable[[list], Any], pickled: bool = False):
        self._make, self._collate, self._pickled = make, collate, pickled

    def __getitem__(self, keys: list) -> Any:
        try:
            found = self._collate([self._make(key) for key in keys])
        except CcmimError as error:
            found = error
        return pickle.dumps(found, pickle.HIGHEST_PROTOCOL) if self._pickled else found
