"""This module counts the threads of a rank, and lets them compute results ahead of their use."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_count(workers: int) -> int:
    """Return `workers`, or for 0 a rank's share of the cores that this process may use, among the machine's ranks."""
    if workers:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # torchrun's variable, as in ranks/session.py
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def look_ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """Yield the items in order, with the next `count` items already taken from `items`."""
    items = iter(items)
    taken = deque(islice(items, count))
    for item in items:
        taken.append(item)
        yield taken.popleft()
    yield from taken


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int, count: int) -> Iterator[Result]:
    """Yield function(item) of each item in order, while `threads` threads compute the next `count` results."""
    with ThreadPoolExecutor(threads) as pool:
        for future in look_ahead((pool.submit(function, item) for item in items), count):
            yield future.result()
