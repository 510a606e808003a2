"""Faults that the soak injects into a run from outside while it trains."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from soak_job import LAUNCHED, PATIENCE, STEP, Job

from ccmim_fast.checkpoints import io

# Effects of faults, and the patterns by which the run's output shows them.
SIGNS = {
    "launched again": LAUNCHED,
    "stopped in order, all saved": r"stopped by SIG.* all saved",
    "a damaged checkpoint skipped": r"skipped the checkpoint",
    "a save failed, training went on": r"not saved.*training goes on",
    "a step skipped": r"are not finite: it is skipped",
    "went back to a checkpoint": r"goes on with the weights of step",
    "numbers stay not finite, exit 4": r"no other checkpoint to go back to",
    "an image left out": r"is left out",
    "images indexed anew, another order": r"the images are not those of the checkpoint",
    "no capture": r"no capture:",
}


class Fault(NamedTuple):
    """A kind of fault.

    Attributes:
        act: injects the fault, and returns a description.
        sign: pattern that the run's output must then match; empty: none.
        ends: True if processes end.
    """

    act: Callable[[Job, random.Random], str]
    sign: str
    ends: bool


def kill(job: Job, draw: random.Random) -> str:
    pid = draw.choice(job.ranks())
    who = job.processes().get(pid)
    os.kill(pid, signal.SIGKILL)
    return f"kill -9 of {who}"


def terminate(job: Job, draw: random.Random) -> str:
    pid = draw.choice(job.ranks())
    who = job.processes().get(pid)
    os.kill(pid, signal.SIGTERM)
    return f"SIGTERM to {who}"


def start_again(job: Job, draw: random.Random) -> str:
    job.ranks()
    code = job.end()
    job.start()
    return f"SIGTERM to torchrun, which ended with {code}; the job started again"


def pause(job: Job, draw: random.Random) -> str:
    pid, seconds = draw.choice(job.ranks()), draw.uniform(2, 10)
    who = job.processes().get(pid)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)
    return f"{who} stopped for {seconds:.1f} s"


def spoil_image(job: Job, draw: random.Random) -> str:
    path = draw.choice(sorted(path for path in (job.work / "images").rglob("*.*") if path.stat().st_size))
    if draw.random() < 0.5:
        path.unlink()
        return f"{path.name} deleted"
    size = path.stat().st_size
    os.truncate(path, size // 2)
    return f"{path.name} cut from {size} to {size // 2} bytes"


def spoil_checkpoint(job: Job, draw: random.Random) -> str:
    ranks = job.ranks()
    newest = io.checkpoints(job.folder / "checkpoints")[-1]
    place = _flip_byte(newest / io.STATE, draw)
    os.kill(draw.choice(ranks), signal.SIGKILL)
    return f"byte {place} of {newest.name} flipped, then kill -9"


def _flip_byte(path: Path, draw: random.Random) -> int:
    place = draw.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << draw.randrange(8))]))
    return place


def fill_disk(job: Job, draw: random.Random) -> str:
    """Fill the small disk of the run's folder until a save has failed."""
    since, ballast, start = len(job.lines), job.folder.parent / "ballast", time.monotonic()
    try:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        job.wait_for("not saved", since)
    finally:
        ballast.unlink()
    return f"disk full for {time.monotonic() - start:.0f} s"


def spoil_gradients(job: Job, draw: random.Random) -> str:
    rank, steps = draw.randrange(len(job.ranks())), draw.randint(1, 4)
    order = job.orders / f"rank_{rank}"
    new = order.with_suffix(".new")
    new.write_text(str(steps))
    new.rename(order)
    return f"NaN gradients on rank {rank} for {steps} steps"


FAULTS = {
    "kill": Fault(kill, SIGNS["launched again"], True),
    "term": Fault(terminate, SIGNS["launched again"], True),
    "job": Fault(start_again, SIGNS["launched again"], True),
    "checkpoint": Fault(spoil_checkpoint, SIGNS["launched again"], True),
    "pause": Fault(pause, "", False),
    "image": Fault(spoil_image, "", False),
    "disk": Fault(fill_disk, SIGNS["a save failed, training went on"], False),
    "nan": Fault(spoil_gradients, SIGNS["a step skipped"], False),
}


def inject(job: Job, kind: str, draw: random.Random) -> dict[str, Any]:
    """Inject a fault, wait until the run reports it and logs a step again; return a record of the effects.

    Raises:
        EndedError: the run was complete before that.
        MachineError: the run did not recover.
    """
    fault, start = FAULTS[kind], time.monotonic()
    job.follow()
    since, step, launches = len(job.lines), job.step, job.launches
    what = fault.act(job, draw)
    # The step must be logged after the sign: ranks that end may have logged one before it.
    sign = job.wait_for(fault.sign, since) if fault.sign else len(job.lines)
    job.wait_for(STEP, sign)
    led_to = Counter({name: len(job.printed(sign, since)) for name, sign in SIGNS.items()})
    return {
        "kind": kind,
        "what": what,
        "step": step,
        "seconds": round(time.monotonic() - start, 1),
        "launches": job.launches - launches,
        "led_to": {name: count for name, count in led_to.items() if count},
    }


@contextlib.contextmanager
def small_disk(at: Path, megabytes: int) -> Iterator[bool]:
    """Mount a disk in memory at a folder; yield False where mounting is not allowed (root, or `unshare -rm`)."""
    at.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "ccmim-soak", str(at)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(at)], check=False)
