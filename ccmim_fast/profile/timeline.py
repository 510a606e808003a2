"""The timeline turns a Chrome trace into microseconds by kind of work; every moment of a step has one kind."""

import heapq
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
    """Return the microseconds of the profiled steps by (kind, name); they sum to the steps' span.

    On a GPU kernels count; where several run, the first kind of `KINDS` does, so `communication` is the part that no
    computation hides. Time without a kernel is `data wait` while the host waits for data, else `idle`. On a CPU the
    innermost operator counts, and a wait for data before any; time outside of operators, Python's, is `idle`, which has
    no name.

    Args:
        events: `traceEvents` of torch's Chrome trace.
        on_gpu: True if the steps ran on a GPU.

    Raises:
        ValueError: the trace does not hold the range `PROFILED`.
    """
    timed = [event for event in events if event.get("ph") == "X"]
    window = next((e for e in timed if e["name"] == PROFILED and e.get("cat") == "user_annotation"), None)
    if window is None:
        raise ValueError(f"the trace has no range {PROFILED!r}")
    found = (_on_gpu(event) if on_gpu else _on_cpu(event, window["tid"]) for event in timed if event is not window)
    start = float(window["ts"])
    return attribute([interval for interval in found if interval is not None], start, start + window["dur"])


def attribute(intervals: Sequence[Interval], start: float, end: float) -> Counter[tuple[str, str]]:
    """Return the time by (kind, name) between `start` and `end`: a moment is its first interval's by priority."""
    upcoming = deque(sorted((i for i in intervals if i.start < end and i.end > start), key=lambda i: i.start))
    edges = sorted({start, end, *(max(start, i.start) for i in upcoming), *(min(end, i.end) for i in upcoming)})
    spent: Counter[tuple[str, str]] = Counter()
    active: list[tuple[tuple[float, ...], int, Interval]] = []
    for now, until in pairwise(edges):
        while upcoming and upcoming[0].start <= now:
            interval = upcoming.popleft()
            # heapq's smallest is the highest priority; of equal ones the earlier.
            heapq.heappush(active, (tuple(-part for part in interval.priority), -len(upcoming), interval))
        while active and active[0][2].end <= now:
            heapq.heappop(active)
        spent[active[0][2][3:] if active else ("idle", "")] += until - now
    return spent


def _on_gpu(event: dict[str, Any]) -> Interval | None:
    start, name, category = float(event["ts"]), event["name"], event.get("cat")
    waits = name == DATA_WAIT and category == "user_annotation"
    if not waits and category not in _ON_GPU:
        return None
    kind = "data wait" if waits else kind_of_kernel(name)
    return Interval(start, start + event["dur"], (-KINDS.index(kind),), kind, name)


def _on_cpu(event: dict[str, Any], thread: Any) -> Interval | None:
    start, length, name = float(event["ts"]), float(event["dur"]), event["name"]
    if event.get("cat") not in _ON_HOST or event["tid"] != thread:
        return None
    if name == DATA_WAIT:
        return Interval(start, start + length, (math.inf, 0.0), "data wait", name)
    kind = kind_of_op(name)
    if kind == "other" and event["cat"] == "user_annotation":
        return None  # a range around Python, such as DDP's forward
    # The innermost began last; of equal beginnings it is the shorter.
    return Interval(start, start + length, (start, -length), kind, name)
