"""The job of the soak: ranks under torchrun, launched again as often as needed, and their output."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ccmim_fast.errors import MachineError
from ccmim_fast.runs.state import process_start

RANKS = 2
PATIENCE = 600  # seconds, far more than a launch, a save or an epoch takes
_RESTARTS = 10_000
STEP = r"step (\d+)/\d+ · loss"
LAUNCHED = r"^\d+ images · "


class EndedError(Exception):
    """The run is complete, so the event that is waited for cannot come."""


class Job:
    """A job is `ccmim pretrain` under torchrun.

    Args:
        work: folder for its output, `out.log`.
        folder: of the run.
        settings: of pretraining.

    Attributes:
        lines: printed so far.
        step: the last logged step.
        launches: number of launches of the ranks.
        repeated: number of steps that were taken again after launches.
        codes: exit codes of torchrun.
    """

    def __init__(self, work: Path, folder: Path, settings: list[str]):
        self.work, self.folder, self._settings = work, folder, settings
        self.orders = work / "orders"
        self.orders.mkdir()
        self.log = work / "out.log"
        self.log.touch()
        self.lines: list[str] = []
        self.step = self.launches = self.repeated = 0
        self.codes: list[int] = []
        self.agent: subprocess.Popen | None = None
        self._known: dict[int, int | None] = {}  # pid -> when it began
        self._read, self._rest, self._following = 0, "", threading.Lock()

    def start(self, *more: str) -> None:
        """Launch the ranks; they resume from the newest checkpoint."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        launcher += [f"--max-restarts={_RESTARTS}", "--monitor-interval=0.2"]
        script = Path(__file__).with_name("soak_rank.py")
        command = [sys.executable, *launcher, str(script), str(self.orders), f"--run.dir={self.folder}"]
        command += [*self._settings, "--run.resume=auto", *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("a") as log:
            self.agent = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def processes(self) -> dict[int, str]:
        """Return the living processes: pid to `torchrun` or `rank n`."""
        if self.agent is None or self.agent.poll() is not None:
            return {}
        found = {self.agent.pid: "torchrun"}
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split()
            found |= {pid: f"rank {_rank_of(pid)}" for pid in map(int, children) if _rank_of(pid) is not None}
        for pid in found:
            self._known.setdefault(pid, process_start(pid))
        return found

    def ranks(self) -> list[int]:
        """Return the pids of all ranks; wait until all are there."""
        self.wait_until(lambda: len(self.processes()) == 1 + RANKS, f"{RANKS} ranks")
        return [pid for pid, name in self.processes().items() if name != "torchrun"]

    def left_over(self) -> list[int]:
        """Return the pids of processes that were ever seen and still live."""
        return [pid for pid, start in list(self._known.items()) if start is not None and process_start(pid) == start]

    def follow(self) -> None:
        """Read the lines that were printed since the last call."""
        with self._following, self.log.open(encoding="utf-8", errors="replace", newline="") as file:
            file.seek(self._read)
            text = self._rest + file.read()
            self._read = file.tell()
            *whole, self._rest = text.split("\n")
            for line in whole:
                self._take(line)

    def _take(self, line: str) -> None:
        self.lines.append(line)
        if re.search(LAUNCHED, line):
            self.launches += 1
        logged = re.search(STEP, line)
        if logged:
            step = int(logged[1])
            self.repeated += max(0, self.step - step)
            self.step = step

    def printed(self, pattern: str, since: int) -> list[int]:
        """Return the numbers of the lines from `since` on that match `pattern`."""
        self.follow()
        return [i for i in range(since, len(self.lines)) if re.search(pattern, self.lines[i])]

    def wait_for(self, pattern: str, since: int) -> int:
        """Wait for a line from `since` on that matches `pattern`; return its number. See `wait_until` for errors."""
        self.wait_until(lambda: bool(self.printed(pattern, since)), repr(pattern))
        return self.printed(pattern, since)[0]

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        """Return when `happened()` is true.

        Raises:
            EndedError: torchrun has ended in order.
            MachineError: `happened` did not become true in time, or torchrun failed.
        """
        start = time.monotonic()
        while not happened():
            if self.agent.poll() == 0:
                raise EndedError
            if self.agent.returncode is not None:
                raise MachineError(f"torchrun ended with {self.agent.returncode}; see {self.log}")
            if time.monotonic() - start > PATIENCE:
                raise MachineError(f"waited {PATIENCE} seconds for {what}; see {self.log}")
            time.sleep(0.1)

    def end(self) -> int:
        """Ask torchrun to end its ranks and itself; return its exit code."""
        self.agent.send_signal(signal.SIGTERM)
        self.codes.append(self.agent.wait(PATIENCE))
        return self.codes[-1]

    def kill(self) -> None:
        """Kill all processes that still live."""
        for pid in self.left_over():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.agent is not None:
            self.agent.wait()


def _rank_of(pid: int) -> int | None:
    """Return the RANK of a process; None if it has none, or has ended."""
    with contextlib.suppress(OSError):
        found = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
        return int(found[1]) if found else None
    return None
