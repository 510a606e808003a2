"""Threads load images ahead of their use; each bad sample is replaced by its fallback."""

# B images of one micro-batch

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.source import UnreadableError
from ccmim_fast.data.stream.plan import MicroBatch, Plan
from ccmim_fast.data.threads import Item, Result, look_ahead
from ccmim_fast.errors import DataError

# Micro-batches in work while one is used: the next one, and one more so that no thread is idle between the two.
AHEAD = 2
_ATTEMPTS = 100  # each fails with the share of bad samples, which `data.max_bad` keeps small


def prefetch(
    load: Callable[[MicroBatch], tuple[MicroBatch, Result]],
    micro_batches: Iterable[MicroBatch],
    threads: int,
    samples_per_task: int = 1,
) -> Iterator[tuple[MicroBatch, list[Result]]]:
    """Yield each micro-batch with what `load` returns for its B samples, in order.

    `load` takes a micro-batch of one sample; it returns the sample that it has loaded, this one or its fallback, and
    the result. Its exception is raised when the micro-batch is due; tasks that have not begun are dropped then. There
    is more than one sample per task where loading a sample takes microseconds.
    """

    def submit(batch: MicroBatch) -> list[Future]:
        samples = batch.samples()
        starts = range(0, len(samples), samples_per_task)
        parts = (samples[start : start + samples_per_task] for start in starts)
        return [pool.submit(lambda part: list(map(load, part)), part) for part in parts]

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
    """Load a micro-batch of one, or the first of its fallbacks for which `load` does not raise DataError.

    Return the sample that was loaded and the result. The fallbacks are drawn by (seed, epoch, sample id): the same in
    every run, on every rank, with every loader. `bad_samples` records each failure. Raises DataError if it allows no
    more, or if no fallback can be loaded either.
    """
    first = sample
    for attempt in range(_ATTEMPTS):
        loaded, reason = attempted(load, sample, sample.ids_B.item(), bad_samples)
        if reason is None:
            return sample, loaded
        sample = plan.fallback(first.ids_B.item(), first.epochs_B.item(), attempt)
    raise DataError(f"{reason}; and {_ATTEMPTS - 1} samples drawn in its place cannot be used either")


def attempted(
    load: Callable[[Item], Result], item: Item, index: int, bad_samples: BadSamples
) -> tuple[Result, None] | tuple[None, str]:
    """Return `load(item)`, of the sample `index`, and None; or None, and why it raised DataError.

    `bad_samples` records the failure, and raises DataError if it allows no more; what it knows to fail is not tried.
    """
    reason, lasting = bad_samples.known.get(index), True
    if reason is None:
        try:
            return load(item), None
        except DataError as error:
            reason, lasting = str(error), not isinstance(error, UnreadableError)
    bad_samples.add(index, reason, lasting)
    return None, reason
