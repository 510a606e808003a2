"""Memory, handles and threads of a run's processes are sampled from outside, to see if they grow."""

# n samples

import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from soak_job import Job

EVERY = 2.0  # seconds


class Sample(NamedTuple):
    """A sample of one process.

    Attributes:
        seconds: since the start.
        name: `torchrun` or `rank n`.
        resident, anonymous: memory in MB; leaks show in the anonymous one (heap and stacks).
        handles, threads: number of open ones.
        step: the last logged step.
    """

    seconds: float
    pid: int
    name: str
    resident: float
    anonymous: float
    handles: int
    threads: int
    step: int


class Slope(NamedTuple):
    """The rise of a least-squares line per unit of x, and its standard error."""

    rise: float
    error: float


class Sampler(threading.Thread):
    """This thread samples all processes of `job` every other second until `stop`.

    Attributes:
        samples: so far.
        disk: largest and last size of the run's folder, bytes.
        failed: the error that ended the thread, or None.
    """

    def __init__(self, job: Job, start: float):
        super().__init__(name="samples", daemon=True)
        self._job, self._start, self._stopped = job, start, threading.Event()
        self.samples: list[Sample] = []
        self.disk = (0, 0)
        self.failed: Exception | None = None

    def run(self) -> None:
        try:
            while not self._stopped.wait(EVERY):
                self._job.follow()
                for pid, name in self._job.processes().items():
                    found = sample_process(pid)
                    if found is not None:
                        seconds = round(time.monotonic() - self._start, 1)
                        self.samples.append(Sample(seconds, pid, name, *found, self._job.step))
                now = size_of(self._job.folder)
                self.disk = (max(self.disk[0], now), now)
        except Exception as error:
            self.failed = error

    def stop(self) -> None:
        self._stopped.set()
        self.join()
        if self.failed is not None:
            raise self.failed


def sample_process(pid: int) -> tuple[float, float, int, int] | None:
    """Return MB of resident and anonymous memory, handles and threads of a process; None if it has ended."""
    try:
        memory = Path(f"/proc/{pid}/smaps_rollup").read_text()
        status = Path(f"/proc/{pid}/status").read_text()
        handles = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    kilobytes = dict(re.findall(r"^(Rss|Anonymous): +(\d+) kB", memory, re.MULTILINE))
    threads = re.search(r"^Threads:\s+(\d+)", status, re.MULTILINE)
    if len(kilobytes) < 2 or threads is None:  # the process is about to end
        return None
    rss, anonymous = (round(int(kilobytes[name]) / 1000, 3) for name in ("Rss", "Anonymous"))
    return rss, anonymous, handles, int(threads[1])


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder; files may come and go meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except OSError:
                continue
    return total


def slope(x_n: Sequence[float], y_n: Sequence[float]) -> Slope:
    """Return the slope of y over x.

    Neighbouring samples are correlated, and count less than independent ones: the error counts n (1 - r) / (1 + r) of
    them, where r is the correlation of a residual with the next one.
    """
    x_n, y_n = np.asarray(x_n, dtype=np.float64), np.asarray(y_n, dtype=np.float64)
    x_n = x_n - x_n.mean()
    spread = float(x_n @ x_n)
    rise = float(x_n @ y_n) / spread
    left_n = y_n - y_n.mean() - rise * x_n
    squares = float(left_n @ left_n)
    r = float(left_n[1:] @ left_n[:-1]) / squares if squares > 0 else 0.0
    r = min(max(r, 0.0), 0.99)
    independent = max(len(x_n) * (1 - r) / (1 + r), 3.0)
    return Slope(rise, (squares / (independent - 2) / spread) ** 0.5)


def lives(samples: Sequence[Sample], shortest: float, warm_up: float) -> list[dict[str, Any]]:
    """Return memory and handles of each process that lived for at least `shortest` seconds.

    The slopes leave out the first `warm_up` seconds.
    """
    of_pid: dict[int, list[Sample]] = {}
    for sample in samples:
        of_pid.setdefault(sample.pid, []).append(sample)
    found = []
    for group in of_pid.values():
        lived = group[-1].seconds - group[0].seconds
        # The last two samples may come from the process while it ended.
        warm = [sample for sample in group[:-2] if sample.seconds >= group[0].seconds + warm_up]
        if lived >= shortest and len(warm) > 3:
            found.append(_life(group, warm, lived))
    return found


def _life(group: list[Sample], warm: list[Sample], lived: float) -> dict[str, Any]:
    memory = slope([sample.seconds / 3600 for sample in warm], [sample.anonymous for sample in warm])
    steps = warm[-1].step - warm[0].step
    hours = (warm[-1].seconds - warm[0].seconds) / 3600
    per_1000 = Slope(*(1000 * value * hours / steps for value in memory)) if steps > 0 else None
    return {
        "name": warm[0].name,
        "from_seconds": group[0].seconds,
        "minutes": lived / 60,
        "steps": steps,
        "anonymous_mb": {
            "first": warm[0].anonymous,
            "last": warm[-1].anonymous,
            "max": max(s.anonymous for s in group),
        },
        "resident_mb_last": warm[-1].resident,
        "mb_per_hour": memory._asdict(),
        "mb_per_1000_steps": per_1000._asdict() if per_1000 else None,
        "handles": {"first": warm[0].handles, "last": warm[-1].handles, "max": max(s.handles for s in group)},
        "threads": {"first": warm[0].threads, "last": warm[-1].threads, "max": max(s.threads for s in group)},
    }


def plot(samples: Sequence[Sample], faults: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot memory and handles over time, and the faults below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    memory, handles, done = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    colours = {"torchrun": "C7", "rank 0": "C0", "rank 1": "C1"}
    for pid in dict.fromkeys(sample.pid for sample in samples):
        group = [sample for sample in samples if sample.pid == pid]
        minutes, colour = [sample.seconds / 60 for sample in group], colours[group[0].name]
        memory.plot(minutes, [sample.anonymous for sample in group], color=colour, linewidth=1)
        handles.plot(minutes, [sample.handles for sample in group], color=colour, linewidth=1)
    for name, colour in colours.items():
        memory.plot([], [], color=colour, label=name)
    kinds = sorted({fault["kind"] for fault in faults})
    done.scatter([f["at"] / 60 for f in faults], [kinds.index(f["kind"]) for f in faults], s=12, color="C3")
    done.set_yticks(range(len(kinds)), kinds)
    memory.set(ylabel="anonymous memory, MB", ylim=(0, None))
    handles.set(ylabel="open handles", ylim=(0, None))
    done.set(xlabel="minutes", ylabel="faults")
    memory.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
