"""What each rank says of itself, in a small file of its own in the run's folder; and from all of them, what is wrong.

A file, because it is there when its rank, its machine or the store of the process group is not.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ccmim_fast.runs.state import process_start

# In the order in which a rank comes through them: within a step's number the later one is further on.
PHASES = (
    "beginning",
    "indexing images",
    "waiting for the index",
    "building the model",
    "loading a checkpoint",
    "in step",
    "saving",
    "looking at the model",
    "waiting for images",
)
DONE = "done"
_STACKS = 4  # different ones in a report


class Heartbeat(NamedTuple):
    """What a rank said of itself.

    Attributes:
        launch: of its process; files of earlier launches lie about.
        rank, host, pid, started: the process; `started` as in `RunState`.
        step: the last one that was begun, from 1.
        phase: one of `PHASES`.
        since: when that began, in seconds since 1970 of its machine's clock.
        told: when it said so, likewise.
        end: empty; `DONE`; or how it ended, in a line.
    """

    launch: str
    rank: int
    host: str
    pid: int
    started: int | None
    step: int
    phase: str
    since: float
    told: float
    end: str = ""

    @property
    def position(self) -> tuple[int, int]:
        """The larger the further on."""
        return self.step, PHASES.index(self.phase)

    @property
    def who(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    @property
    def where(self) -> str:
        """`in step 8`, `saving after step 7`, `building the model`."""
        if self.phase == "in step":
            return f"{self.phase} {self.step}"
        return f"{self.phase} after step {self.step}" if self.step else self.phase

    @property
    def is_gone(self) -> bool:
        """Without a word: its process is not there. False of another machine's, of which nobody here knows."""
        on_this = self.host == socket.gethostname()
        return not self.end and on_this and (self.started is None or process_start(self.pid) != self.started)


class Wrong(NamedTuple):
    """Ranks that the others wait for, and why: `ended`, `gone`, `silent`, `behind`; or none, and `level`."""

    ranks: list[int]
    why: str


def write_heartbeat(folder: Path, beat: Heartbeat) -> None:
    """A reader finds the old one or the new one, whole. A full disk is no reason to stop."""
    path = folder / f"rank_{beat.rank}.json"
    new = path.with_suffix(".new")
    with contextlib.suppress(OSError):
        new.write_text(json.dumps(beat._asdict()))
        new.replace(path)


def read_heartbeats(folder: Path, launch: str, ranks: Iterable[int]) -> list[Heartbeat | None]:
    """Of each of these ranks; None where it has said nothing in this launch."""
    return [_read_heartbeat(folder / f"rank_{rank}.json", launch) for rank in ranks]


def _read_heartbeat(path: Path, launch: str) -> Heartbeat | None:
    try:
        beat = Heartbeat(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return beat if beat.launch == launch and beat.phase in PHASES else None


def what_is_wrong(beats: Sequence[Heartbeat | None], now: float, silence: float) -> Wrong:
    """The worst that is known of any rank.

    Args:
        now: seconds since 1970; machines' clocks may differ by less than `silence`.
        silence: seconds after which a rank that tells nothing is out of action: stopped, or its machine is gone.
    """
    there = [(rank, beat) for rank, beat in enumerate(beats) if beat is None or beat.end != DONE]
    said = [(rank, beat) for rank, beat in there if beat is not None]
    last = max((beat.position for _, beat in said), default=())
    first = min((beat.position for _, beat in said), default=())
    found = {
        "ended": [rank for rank, beat in said if beat.end],
        "gone": [rank for rank, beat in said if beat.is_gone],
        "silent": [rank for rank, beat in there if beat is None or (not beat.end and beat.told < now - silence)],
        "behind": [rank for rank, beat in said if beat.position == first < last],
    }
    return next((Wrong(ranks, why) for why, ranks in found.items() if ranks), Wrong([], "level"))


def headline(beats: Sequence[Heartbeat | None], wrong: Wrong) -> str:
    """One line: which rank, what is with it, in which step and phase, since when, and which ranks wait for it."""
    if not wrong.ranks:
        where = sorted({beat.where for beat in beats if beat is not None})
        return f"no rank is behind the others: all are {', '.join(where) or 'silent'}"
    rank, beat = wrong.ranks[0], beats[wrong.ranks[0]]
    if beat is None:
        line = f"rank {rank} has said nothing yet"
    elif wrong.why == "ended":
        line = f"{beat.who} ended, {beat.where}: {beat.end}"
    elif wrong.why == "gone":
        line = f"{beat.who} is gone without a word, perhaps killed: last heard of {beat.where} at {clock(beat.told)}"
    elif wrong.why == "silent":
        line = f"{beat.who} is silent: last heard of {beat.where} at {clock(beat.told)}"
    else:
        line = f"{beat.who} stands still: {beat.where} since {clock(beat.since)}"
    if wrong.ranks[1:]:
        line += f"; likewise {_named(wrong.ranks[1:])}"
    if wrong.why in ("ended", "gone"):
        return line
    waiting = [b.rank for b in beats if b is not None and b.rank not in wrong.ranks and b.end != DONE]
    return f"{line}; {_named(waiting)} wait{'s' * (len(waiting) == 1)} for it" if waiting else line


def report(beats: Sequence[Heartbeat | None], wrong: Wrong, stacks: dict[int, str]) -> str:
    """The headline, where every rank is, and what some of them are doing.

    Args:
        stacks: of ranks that gave one; equal ones are told once, and those of the fewest ranks first.
    """
    places: dict[str, list[int]] = {}
    for rank, beat in enumerate(beats):
        places.setdefault("nothing said" if beat is None else beat.end or beat.where, []).append(rank)
    lines = [headline(beats, wrong), "", f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, the last words:"]
    for place, ranks in places.items():
        since = sorted(beats[rank].since for rank in ranks if beats[rank] is not None)
        span = [clock(since[i]) for i in (0, -1)] if since else []
        words = f", since {' to '.join(dict.fromkeys(span))}" if span else ""
        lines.append(f"  {_named(ranks)}: {place}{words}")
    shared: dict[str, list[int]] = {}
    for rank, stack in stacks.items():
        shared.setdefault(stack.rstrip(), []).append(rank)
    for stack, ranks in sorted(shared.items(), key=lambda pair: len(pair[1]))[:_STACKS]:
        lines += ["", f"stack of {_named(ranks)}:", stack]
    return "\n".join(lines) + "\n"


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranges(ranks)}"


def ranges(ranks: Sequence[int]) -> str:
    """`0, 2-7` of ascending numbers."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(f"{part[0]}" if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def heartbeat_of(launch: str, rank: int, step: int, phase: str, age: float, end: str) -> Heartbeat:
    """Of this process, now; `age`: seconds that it is in the phase."""
    now, pid = time.time(), os.getpid()
    return Heartbeat(launch, rank, socket.gethostname(), pid, process_start(pid), step, phase, now - age, now, end)
