"""Images loaded by threads ahead of their use, each bad sample replaced by its fallback."""

# B images of one micro-batch

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.source import UnreadableError
from ccmim_fast.data.stream.plan import MicroBatch, Plan
from ccmim_fast.errors import DataError

# Micro-batches in work while one is used: the next one, and one more so that no thread is idle between the two.
AHEAD = 2
_ATTEMPTS = 100  # each fails with the share of bad samples, which `data.max_bad` keeps small

Result = TypeVar("Result")


def thread_count(workers: int) -> int:
    """Return `workers`, or for 0 a rank's share of the cores that this process may use, among the machine's ranks."""
    if workers:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # torchrun's variable, as in ranks/session.py
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def look_ahead(items: Iterable[Result], count: int) -> Iterator[Result]:
    """Yield the items in order, with the next `count` items already taken from `items`."""
    items = iter(items)
    taken = deque(islice(items, count))
    for item in items:
        taken.append(item)
        yield taken.popleft()
    yield from taken


def prefetch(
    load: Callable[[MicroBatch], tuple[MicroBatch, Result]],
    micro_batches: Iterable[MicroBatch],
    threads: int,
    samples_per_task: int = 1,
) -> Iterator[tuple[MicroBatch, list[Result]]]:
    """Yield each micro-batch with what `load` returns for its B samples, in order.

    Args:
        load: takes a micro-batch of one sample; returns the sample that it has loaded, this one or its fallback, and
            the result. An exception is raised when the micro-batch is due; tasks that have not begun are dropped then.
        samples_per_task: more than one where loading a sample is a matter of microseconds.
    """

    def load_part(samples: list[MicroBatch]) -> list[tuple[MicroBatch, Result]]:
        return [load(sample) for sample in samples]

    def submit(batch: MicroBatch) -> list[Future]:
        samples = batch.samples()
        starts = range(0, len(samples), samples_per_task)
        return [pool.submit(load_part, samples[start : start + samples_per_task]) for start in starts]

    pool = ThreadPoolExecutor(threads)
    try:
        for futures in look_ahead(map(submit, micro_batches), AHEAD):
            samples, results = zip(*(pair for future in futures for pair in future.result()))
            yield MicroBatch.join(samples), list(results)
    finally:
        # No wait: an iterator that was abandoned may be collected inside a starting thread, which holds the lock that
        # joining any thread needs.
        pool.shutdown(wait=False, cancel_futures=True)


def load_with_fallback(
    load: Callable[[MicroBatch], Result], sample: MicroBatch, plan: Plan, bad_samples: BadSamples
) -> tuple[MicroBatch, Result]:
    """Load a sample, or the first of its fallbacks that can be loaded; return the sample loaded and the result.

    The fallbacks are drawn by (seed, epoch, sample id): the same in every run, on every rank, with every loader.

    Args:
        load: raises DataError for an image that cannot be used.
        sample: a micro-batch of one.
        bad_samples: the account in which each failure is recorded.

    Raises:
        DataError: no fallback can be loaded either, or `bad_samples` allows no more.
    """
    index, epoch = sample.ids_B.item(), sample.epochs_B.item()
    for attempt in range(_ATTEMPTS):
        current = sample.ids_B.item()
        reason, lasting = bad_samples.known.get(current), True
        if reason is None:
            try:
                return sample, load(sample)
            except DataError as error:
                reason, lasting = str(error), not isinstance(error, UnreadableError)
        bad_samples.add(current, reason, lasting)
        sample = plan.fallback(index, epoch, attempt)
    raise DataError(f"{reason}; and {_ATTEMPTS - 1} samples drawn in its place cannot be used either")
