"""The timeline turns a Chrome trace into microseconds by kind of work; every moment of a step has one kind."""

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ccmim_fast.profile.kinds import KINDS, kind_of_kernel, kind_of_op

# Names of our own ranges in the trace.
PROFILED = "ccmim_fast: profiled steps"
DATA_WAIT = "ccmim_fast: data wait"

_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_ON_HOST = ("cpu_op", "user_annotation")


class Interval(NamedTuple):
    """An operator or kernel at work from `start` to `end`, microseconds; of several the highest `priority` counts."""

    start: float
    end: float
    priority: tuple[float, ...]
    kind: str
    name: str


def read_timeline(events: Iterable[dict[str, Any]], *, on_gpu: bool) -> Counter[tuple[str, str]]:
    """Return the microseconds of the profiled steps by (kind, name), from the `traceEvents` of torch's Chrome trace.

    If they ran on a GPU, kernels count; where several run, the first kind of `KINDS` does, so `communication` is the
    part that no computation hides. Time without a kernel is `data wait` while the host waits for data, else `idle`. On
    a CPU the innermost operator counts, and a wait for data before any; time outside of operators, Python's, is `idle`,
    which has no name. All sum to the steps' span. Raises ValueError where the trace does not hold the range `PROFILED`.
    """
    timed = [event for event in events if event.get("ph") == "X"]
    window = next((e for e in timed if e["name"] == PROFILED and e.get("cat") == "user_annotation"), None)
    if window is None:
        raise ValueError(f"the trace has no range {PROFILED!r}")
    found = (_interval(event, on_gpu, window["tid"]) for event in timed if event is not window)
    start = float(window["ts"])
    return attribute([interval for interval in found if interval is not None], start, start + window["dur"])


def attribute(intervals: Sequence[Interval], start: float, end: float) -> Counter[tuple[str, str]]:
    """Return the time by (kind, name) between `start` and `end`: a moment is its first interval's by priority."""
    upcoming = deque(sorted((i for i in intervals if i.start < end and i.end > start), key=lambda i: i.start))
    edges = sorted({start, end, *(max(start, i.start) for i in upcoming), *(min(end, i.end) for i in upcoming)})
    spent: Counter[tuple[str, str]] = Counter()
    active: list[Interval] = []  # as many as operators call each other, or kernels overlap
    for now, until in pairwise(edges):
        while upcoming and upcoming[0].start <= now:
            active.append(upcoming.popleft())
        active = [interval for interval in active if interval.end > now]
        first = max(active, key=lambda i: i.priority, default=None)
        spent[("idle", "") if first is None else (first.kind, first.name)] += until - now
    return spent


def _interval(event: dict[str, Any], on_gpu: bool, thread: Any) -> Interval | None:
    """Return the interval of an event, None for one that does not count; `thread` is the host's that runs the steps."""
    start, length, name, category = float(event["ts"]), float(event["dur"]), event["name"], event.get("cat")
    on_host = category in _ON_HOST and event["tid"] == thread
    if on_host and name == DATA_WAIT:
        kind, priority = "data wait", (-KINDS.index("data wait"),) if on_gpu else (math.inf,)
    elif on_gpu and category in _ON_GPU:
        kind = kind_of_kernel(name)
        priority = (-KINDS.index(kind),)
    elif on_host and not on_gpu:
        kind, priority = kind_of_op(name), (start, -length)  # the innermost began last, or is the shorter
        if kind == "other" and category == "user_annotation":
            return None  # a range around Python, such as DDP's forward
    else:
        return None
    return Interval(start, start + length, priority, kind, name)
