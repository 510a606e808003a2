"""Images read ahead of their use by threads."""

# B images of one micro-batch

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from ccmim_fast.data.plan import MicroBatch

AHEAD = 2  # micro-batches in work while one is used: the next one, and one more so that no thread idles at the seam

Result = TypeVar("Result")


def thread_count(workers: int) -> int:
    """`workers`, or for 0 the number of cores this process may use."""
    if workers:
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prefetch(
    load: Callable[[int, np.ndarray, bool], Result], micro_batches: Iterable[MicroBatch], threads: int
) -> Iterator[tuple[MicroBatch, list[Result]]]:
    """Each micro-batch with what `load(id, box, flipped)` gives for its B images, in order.

    An exception of `load` is raised when its micro-batch has its turn; what is still waiting then is dropped.
    """
    pool = ThreadPoolExecutor(threads)
    pending: deque = deque()
    try:
        for batch in micro_batches:
            arguments = zip(batch.ids_B.tolist(), batch.boxes_B4, batch.flips_B.tolist())
            pending.append((batch, [pool.submit(load, *each) for each in arguments]))
            if len(pending) > AHEAD:
                yield _finish(*pending.popleft())
        while pending:
            yield _finish(*pending.popleft())
    finally:
        # Without waiting: an iterator left half-way may be collected inside a starting thread, which holds the lock
        # that joining any thread needs.
        pool.shutdown(wait=False, cancel_futures=True)


def _finish(batch: MicroBatch, futures: list) -> tuple[MicroBatch, list]:
    return batch, [future.result() for future in futures]
