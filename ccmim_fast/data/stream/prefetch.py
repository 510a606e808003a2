"""Images read ahead of their use by threads."""

# B images of one micro-batch

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ccmim_fast.data.stream.plan import MicroBatch

AHEAD = 2  # micro-batches in work while one is used: the next one, and one more so that no thread idles at the seam

Result = TypeVar("Result")


def thread_count(workers: int) -> int:
    """`workers`, or for 0 a rank's share of the cores: those this process may use, among a machine's ranks."""
    if workers:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # torchrun's, as in ranks/session.py
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def prefetch(
    load: Callable[[MicroBatch], tuple[MicroBatch, Result]],
    micro_batches: Iterable[MicroBatch],
    threads: int,
    at_once: int = 1,
) -> Iterator[tuple[MicroBatch, list[Result]]]:
    """What `load` gives for each of the B samples of each micro-batch, in order.

    Args:
        load: takes a micro-batch of one sample; returns the one it took in its place, and what it made of it. Its
            exception is raised when the micro-batch has its turn; what is still waiting then is dropped.
        at_once: samples that a thread takes at a time; more than one where each is a matter of microseconds.
    """

    def load_some(samples: list[MicroBatch]) -> list[tuple[MicroBatch, Result]]:
        return [load(sample) for sample in samples]

    pool = ThreadPoolExecutor(threads)
    pending: deque = deque()
    try:
        for batch in micro_batches:
            samples = batch.samples()
            parts = (samples[start : start + at_once] for start in range(0, len(samples), at_once))
            pending.append([pool.submit(load_some, part) for part in parts])
            if len(pending) > AHEAD:
                yield _finish(pending.popleft())
        while pending:
            yield _finish(pending.popleft())
    finally:
        # Without waiting: an iterator left half-way may be collected inside a starting thread, which holds the lock
        # that joining any thread needs.
        pool.shutdown(wait=False, cancel_futures=True)


def _finish(futures: list) -> tuple[MicroBatch, list]:
    samples, results = zip(*(pair for future in futures for pair in future.result()))
    return MicroBatch.join(samples), list(results)
