"""From a Chrome trace to microseconds by kind of work: every moment of the profiled steps belongs to one kind."""

import heapq
import math
from collections import Counter
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
    """Something at work from `start` to `end`, microseconds; where several are, the one of highest `rank` counts."""

    start: float
    end: float
    rank: tuple[float, ...]
    kind: str
    name: str


def read_timeline(events: Iterable[dict[str, Any]], *, on_gpu: bool) -> Counter[tuple[str, str]]:
    """Microseconds by (kind, name) of the profiled steps; they sum to the steps' span. Idle time has no name.

    On a GPU the kernels tell; where several run, the first kind of `KINDS` counts, so communication is what computation
    does not hide; time without a kernel is `data wait` while the host waits for data, else `idle`. On a CPU the
    innermost operator counts, inside a wait for data `data wait`; time outside of operators, Python's, is `idle`.

    Args:
        events: `traceEvents` of torch's Chrome trace.
        on_gpu: whether the steps ran there.

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
    """Time by (kind, name) between `start` and `end`: each moment to the interval of highest rank, or `idle`."""
    waiting = sorted((i for i in intervals if i.start < end and i.end > start), key=lambda i: i.start)
    edges = sorted({start, end, *(max(start, i.start) for i in waiting), *(min(end, i.end) for i in waiting)})
    spent: Counter[tuple[str, str]] = Counter()
    active: list[tuple[tuple[float, ...], int]] = []
    upcoming = 0
    for now, until in pairwise(edges):
        while upcoming < len(waiting) and waiting[upcoming].start <= now:
            # heapq's smallest is the highest rank.
            heapq.heappush(active, (tuple(-part for part in waiting[upcoming].rank), upcoming))
            upcoming += 1
        while active and waiting[active[0][1]].end <= now:
            heapq.heappop(active)
        at_work = waiting[active[0][1]] if active else None
        spent[(at_work.kind, at_work.name) if at_work else ("idle", "")] += until - now
    return spent


def _on_gpu(event: dict[str, Any]) -> Interval | None:
    start, name, category = float(event["ts"]), event["name"], event.get("cat")
    if category in _ON_GPU:
        kind = kind_of_kernel(name)
    elif name == DATA_WAIT and category == "user_annotation":
        kind = "data wait"
    else:
        return None
    return Interval(start, start + event["dur"], (-KINDS.index(kind),), kind, name)


def _on_cpu(event: dict[str, Any], thread: Any) -> Interval | None:
    start, length, name = float(event["ts"]), float(event["dur"]), event["name"]
    if event.get("cat") not in _ON_HOST or event["tid"] != thread:
        return None
    if name == DATA_WAIT:
        return Interval(start, start + length, (math.inf, 0.0), "data wait", name)
    kind = kind_of_op(name)
    if kind == "other" and event["cat"] == "user_annotation":
        # A range around Python, such as DDP's forward.
        return None
    # Innermost: the one that began last, of equal beginnings the shorter.
    return Interval(start, start + length, (start, -length), kind, name)
