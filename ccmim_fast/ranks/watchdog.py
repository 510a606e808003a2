"""Keeps ranks from waiting for ever: each says what it does, and when one stands still or is lost, all end.

The training loop only sets three words in memory. A thread writes them into a file every few seconds (`beats`), and
ends this process where the loop cannot: while it waits in a collective, or for an image that does not come. Nothing
here waits for the device.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from ccmim_fast.errors import MachineError, StoppedError
from ccmim_fast.ranks.heartbeat import (
    DONE,
    Heartbeat,
    headline,
    heartbeat_of,
    read_heartbeats,
    report,
    what_is_wrong,
    write_heartbeat,
)
from ccmim_fast.runs.state import read_state, write_state

_WORDS = 200  # small files that all ranks write in a second, at most: a thousand ranks one each in 5 seconds
_INTERVAL = 0.5  # seconds between two words of a rank, at least
_SILENCE = 20.0  # seconds without a word of a rank, after which it is out of action; a third of the time-out at most


class Watchdog:
    """Of one rank; a single process has one that only listens. As a context manager it gives an error its `last_words`.

    Args:
        launch: a name that all ranks of this launch have, and no other launch.
        timeout: seconds in one phase, after which the rank stands still.
        mates: the ranks of this machine.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        launch: str = "",
        timeout: float = float("inf"),
        mates: Sequence[int] = (),
    ):
        self._rank, self._world_size, self._launch, self._timeout = rank, world_size, launch, timeout
        self._mates = mates
        self._interval = max(_INTERVAL, world_size / _WORDS)
        self._silence = min(_SILENCE, timeout / 3)
        self._place = ("beginning", 0, time.monotonic())
        self._end, self._run, self._over = "", None, threading.Event()
        self._one_at_a_time = threading.Lock()

    def mark(self, phase: str, step: int | None = None) -> None:
        """This rank is in `phase` (of `beats.PHASES`) from now on; `step`: that has begun, if it is another one.

        Under a microsecond: nothing is written here.
        """
        self._place = (phase, self._place[1] if step is None else step, time.monotonic())

    def open(self, run: Path) -> None:
        """Begin, in the run's folder, once rank 0 has opened it; all ranks call it."""
        if self._world_size == 1:
            return
        dist.barrier()
        self._run, self._folder = run, run / "ranks"
        self._report = self._folder / f"stopped_{self._launch[:8]}.txt"
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stack_of(self._rank).unlink(missing_ok=True)
        self._tell()
        threading.Thread(target=self._keep, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """All ranks have come to the end."""
        self._end_with(DONE)

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, _: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and (said := self.last_words(error)) is not error:
            raise said from error

    def last_words(self, error: BaseException) -> BaseException:
        """What to raise in place of an error: of one that tells of another rank's end, why that ended.

        All other errors are this rank's own: they are told to the others, who end too. Then, should this process not
        end by itself, for a thread that does not come back, it is ended after the time-out.
        """
        if self._world_size == 1 or self._end:
            return error
        if is_of_others(error):
            return self._lost(error)
        line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self._end_with(line)
        # Ranks stop for a signal by agreement.
        if self._run is not None and not isinstance(error, StoppedError):
            self._write_report(self._beats(), printed=False)  # whoever gets the error will
        return error

    def _lost(self, error: BaseException) -> MachineError:
        """Another rank is lost: which, is known at once on its machine or if it could tell, else when it is silent."""
        if self._run is None:
            self._end = "another rank was lost"
            line = " ".join(str(error).split())[:200]
            return MachineError(f"rank {self._rank} ends: another rank did, see its own line: {line}")
        deadline = time.monotonic() + self._silence + 2 * self._interval
        while not self._report.exists() and time.monotonic() < deadline:
            self._tell()
            if what_is_wrong(self._beats(), time.time(), self._silence).why in ("ended", "gone", "silent"):
                break
            time.sleep(self._interval)
        line = self._write_report(self._beats())
        self._end_with("ended as another rank was lost")
        return MachineError(f"rank {self._rank} ends: {line}")

    def _keep(self) -> None:
        """The thread."""
        while not self._over.wait(self._interval):
            self._tell()
            self._look()

    def _look(self) -> None:
        """Whether this rank stands still, or all are to end."""
        age = time.monotonic() - self._place[2]
        if age > self._timeout:
            self._stands_still()
        elif self._end:
            return
        elif self._report.exists():
            # The loop mostly hears of it by itself, by a connection that breaks.
            self._over.wait(self._silence)
            if not self._end:
                self._exit(self._write_report(self._beats()))
        elif age > self._silence and any(beat and beat.is_gone for beat in self._beats(self._mates)):
            # One of this machine was killed, and the loop has not heard of it: so it may be under NCCL.
            self._exit(self._write_report(self._beats()))

    def _stands_still(self) -> None:
        place = self._place
        with contextlib.suppress(OSError):
            self._stack_of(self._rank).write_text(stacks())
        # The others find out now, too; and what they do then is in the report.
        if self._over.wait(2 * self._interval) or self._place is not place:
            return
        self._exit(self._write_report(self._beats()))

    def _exit(self, line: str) -> None:
        """End this process, whose loop does not come back."""
        words = f"rank {self._rank} ends: {line}"
        if self._rank == 0 and (state := read_state(self._run)) is not None:
            write_state(self._run, state._replace(state="failed", error=words[:300], exit_code=MachineError.exit_code))
        print(f"ccmim: {words}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(MachineError.exit_code)

    def _write_report(self, beats: list[Heartbeat | None], printed: bool = True) -> str:
        """Write the report of this launch, if no other rank has; returns its headline and where it is."""
        wrong = what_is_wrong(beats, time.time(), self._silence)
        found = {rank: stack for rank in wrong.ranks or range(len(beats)) if (stack := self._read_stack(rank))}
        if not wrong.ranks:  # the main threads tell who does not wait in the same place
            found = {rank: stack.partition("\n\n")[0] for rank, stack in found.items()}
        text = report(beats, wrong, found)
        own = self._report.with_suffix(f".{self._rank}")
        try:
            own.write_text(text)
            os.link(own, self._report)  # appears whole, and once
            own.unlink()
        except FileExistsError:
            own.unlink()
            return f"{self._report.read_text().partition(chr(10))[0]}; see {self._report}"
        except OSError:
            return headline(beats, wrong)
        if printed:
            print(f"\n{text}", file=sys.stderr, flush=True)
        return f"{headline(beats, wrong)}; see {self._report}"

    def _beats(self, ranks: Sequence[int] = ()) -> list[Heartbeat | None]:
        """Of some ranks, or of all."""
        return read_heartbeats(self._folder, self._launch, ranks or range(self._world_size))

    def _tell(self) -> None:
        with self._one_at_a_time:
            phase, step, since = self._place
            age = time.monotonic() - since
            write_heartbeat(self._folder, heartbeat_of(self._launch, self._rank, step, phase, age, self._end))

    def _end_with(self, line: str) -> None:
        self._end = line
        self._place = (*self._place[:2], time.monotonic())
        if self._run is not None:
            self._tell()
        if line == DONE:
            self._over.set()

    def _stack_of(self, rank: int) -> Path:
        return self._folder / f"rank_{rank}_stack.txt"

    def _read_stack(self, rank: int) -> str:
        with contextlib.suppress(OSError):
            return self._stack_of(rank).read_text()
        return ""


def is_of_others(error: BaseException) -> bool:
    """Whether it tells that another rank is lost: gloo has no type of its own for that, NCCL and the store have."""
    signs = ("gloo/", "caused pair closure")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(s in str(error) for s in signs)
    )


def stacks() -> str:
    """What the threads of this process do, the main thread first; but for this one and those without work."""
    frames, told = sys._current_frames(), {}
    for thread in sorted(threading.enumerate(), key=lambda thread: thread is not threading.main_thread()):
        frame = frames.get(thread.ident)
        if frame is None or thread is threading.current_thread():
            continue
        calls = traceback.extract_stack(frame)
        if "work_queue.get" not in (calls[-1].line or ""):
            lines = [f"    {call.filename}:{call.lineno} {call.name}: {call.line}" for call in calls]
            told.setdefault("\n".join(lines), []).append(thread.name)
    return "\n\n".join(f"  {', '.join(names)}:\n{lines}" for lines, names in told.items())
