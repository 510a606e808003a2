"""Heartbeats: each rank writes what it does to a file, which remains when rank, machine or process group is lost."""

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ccmim_fast.runs.state import is_alive, read_record, write_record

# In the order in which a rank enters them: at equal step numbers the later phase is further on.
_ONCE = "starting", "indexing images", "waiting for the index", "building the model", "loading a checkpoint"
PHASES = *_ONCE, "in step", "saving", "evaluating the model", "waiting for images"
DONE = "done"
_MAX_STACKS = 4  # different stacks in one report


class Heartbeat(NamedTuple):
    """A heartbeat is what a rank last wrote about itself; `host`, `pid` and `started` tell its process."""

    launch: str  # id of the launch; files of earlier launches may lie in the same folder
    rank: int
    host: str
    pid: int
    started: int | None  # as in `RunState`
    step: int  # number of the newest step that began, from 1
    phase: str  # one of `PHASES`
    phase_began: float  # seconds since 1970, by the clock of its machine
    written: float  # likewise
    outcome: str = ""  # "" while it runs, then `DONE` or its error in one line

    @property
    def position(self) -> tuple[int, int]:
        """The larger position is further on."""
        return self.step, PHASES.index(self.phase)

    @property
    def activity(self) -> str:
        """The phase and step in words: `in step 8`, `saving after step 7`, `building the model`."""
        if self.phase == "in step":
            return f"{self.phase} {self.step}"
        return f"{self.phase} after step {self.step}" if self.step else self.phase

    @property
    def has_died(self) -> bool:
        """True if the process ended without writing an outcome; False on other machines, where nobody can look."""
        return not self.outcome and is_alive(self) is False


class Diagnosis(NamedTuple):
    """The ranks that hold up the others, and the reason: `failed`, `died`, `silent`, `behind`; or none and `level`."""

    ranks: list[int]
    reason: str


def write_heartbeat(folder: Path, heartbeat: Heartbeat) -> None:
    write_record(folder / f"rank_{heartbeat.rank}.json", heartbeat)


def read_heartbeats(folder: Path, launch: str, ranks: Iterable[int]) -> list[Heartbeat | None]:
    """Return the heartbeat of each rank; None for one that has written none in this launch."""
    found = (read_record(folder / f"rank_{rank}.json", Heartbeat) for rank in ranks)
    return [beat if beat is not None and beat.launch == launch and beat.phase in PHASES else None for beat in found]


def diagnose(heartbeats: Sequence[Heartbeat | None], now: float, silence: float) -> Diagnosis:
    """Return the worst problem of any rank, from the heartbeats of all, in their order.

    A rank that wrote none for `silence` seconds before `now` counts as stopped, or its machine as lost; the clocks of
    machines may differ by less.
    """
    running = [(rank, beat) for rank, beat in enumerate(heartbeats) if beat is None or beat.outcome != DONE]
    known = [(rank, beat) for rank, beat in running if beat is not None]
    positions = [beat.position for _, beat in known]
    first, last = min(positions, default=()), max(positions, default=())
    problems = {
        "failed": [rank for rank, beat in known if beat.outcome],
        "died": [rank for rank, beat in known if beat.has_died],
        "silent": [r for r, beat in running if beat is None or (not beat.outcome and beat.written < now - silence)],
        "behind": [rank for rank, beat in known if beat.position == first < last],
    }
    return next((Diagnosis(ranks, reason) for reason, ranks in problems.items() if ranks), Diagnosis([], "level"))


def headline(heartbeats: Sequence[Heartbeat | None], diagnosis: Diagnosis) -> str:
    """Return one line: the rank, its problem, its step and phase, since when, and the ranks that wait for it."""
    ranks, reason = diagnosis
    known = [beat for beat in heartbeats if beat is not None]
    if not ranks:
        activities = ", ".join(sorted({beat.activity for beat in known}))
        return f"no rank is behind the others: all are {activities or 'silent'}"
    beat = heartbeats[ranks[0]]
    if beat is None:
        line = f"rank {ranks[0]} has written no heartbeat yet"
    else:
        last = f"last heartbeat: {beat.activity} at {clock(beat.written)}"
        problem = {
            "failed": f"failed, {beat.activity}: {beat.outcome}",
            "died": f"died without an error message, perhaps killed; {last}",
            "silent": f"is silent; {last}",
            "behind": f"is stuck: {beat.activity} since {clock(beat.phase_began)}",
        }
        line = f"rank {beat.rank} ({beat.host}, process {beat.pid}) {problem[reason]}"
    if ranks[1:]:
        line += f"; likewise {_name(ranks[1:])}"
    waiting = [beat.rank for beat in known if beat.rank not in ranks and beat.outcome != DONE]
    if waiting and reason in ("silent", "behind"):
        line += f"; {_name(waiting)} wait{'s' * (len(waiting) == 1)} for it"
    return line


def report(heartbeats: Sequence[Heartbeat | None], diagnosis: Diagnosis, stacks: dict[int, str]) -> str:
    """Return headline, activity of every rank, and some `stacks`: equal ones once, of the fewest ranks first."""
    activities, by_stack = defaultdict(list), defaultdict(list)
    for rank, beat in enumerate(heartbeats):
        activities["no heartbeat" if beat is None else beat.outcome or beat.activity].append(rank)
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    lines = [headline(heartbeats, diagnosis), "", f"{now}, the last heartbeats:"]
    for activity, ranks in activities.items():
        began = sorted(heartbeats[rank].phase_began for rank in ranks if heartbeats[rank] is not None)
        span = " to ".join(dict.fromkeys(clock(began[i]) for i in (0, -1))) if began else ""
        lines.append(f"  {_name(ranks)}: {activity}{', since ' * bool(span)}{span}")
    for rank, stack in stacks.items():
        by_stack[stack.rstrip()].append(rank)
    for stack, ranks in sorted(by_stack.items(), key=lambda pair: len(pair[1]))[:_MAX_STACKS]:
        lines += ["", f"stack of {_name(ranks)}:", stack]
    return "\n".join(lines) + "\n"


def _name(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranges(ranks)}"


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as text: `0, 2-7`."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))
