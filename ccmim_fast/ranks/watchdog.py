"""The watchdog keeps ranks from waiting for ever: when one rank is stuck or lost, all end and name that rank.

The training loop only sets its phase and step in memory. A thread writes them to a file every few seconds
(`heartbeat.py`), and ends this process where the loop cannot: while it waits in a collective, or for an image that does
not come. Nothing here waits for the device.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from ccmim_fast.errors import MachineError, StoppedError, one_line
from ccmim_fast.ranks.heartbeat import DONE, Heartbeat, diagnose, headline, read_heartbeats, report, write_heartbeat
from ccmim_fast.runs.state import read_state, this_process, write_state

_WRITES = 200  # heartbeats of all ranks per second, at most: a thousand ranks write one each in 5 seconds
_INTERVAL = 0.5  # seconds between two heartbeats of a rank, at least
_SILENCE = 20.0  # seconds without a heartbeat after which a rank counts as lost; a third of the time-out at most


class Watchdog:
    """A watchdog guards one rank, and translates errors that leave its context; that of a single process does nothing.

    All ranks of this launch, and no other launch, have the id `launch`; a rank is stuck after `timeout` s in one phase.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        launch: str = "",
        timeout: float = float("inf"),
        local_ranks: Sequence[int] = (),
    ):
        self._rank, self._world_size, self._launch, self._timeout = rank, world_size, launch, timeout
        self._local_ranks = local_ranks
        self._interval = max(_INTERVAL, world_size / _WRITES)
        self._silence = min(_SILENCE, timeout / 3)
        self._phase = ("starting", 0, time.monotonic())  # name, step, start
        self._outcome, self._run, self._done = "", None, threading.Event()
        self._write_lock = threading.Lock()

    def enter_phase(self, phase: str, step: int | None = None) -> None:
        """Note in memory, in under a microsecond, that `phase` (of `PHASES`) begins, and with it `step` unless None."""
        self._phase = (phase, self._phase[1] if step is None else step, time.monotonic())

    def start(self, run: Path) -> None:
        """Start the thread. All ranks call this with the run's folder, once rank 0 has opened it."""
        if self._world_size == 1:
            return
        dist.barrier()
        self._run, self._folder = run, run / "ranks"
        self._report = self._folder / f"stopped_{self._launch[:8]}.txt"
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stack_file(self._rank).unlink(missing_ok=True)
        self._write()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def finish(self, outcome: str = DONE) -> None:
        """Write how this rank ended; once all are done, stop the thread."""
        self._outcome, self._phase = outcome, (*self._phase[:2], time.monotonic())
        if self._run is not None:
            self._write()
        if outcome == DONE:
            self._done.set()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, _: type | None, error: BaseException | None, *_trace: object) -> None:
        if error is not None and (translated := self.translate_error(error)) is not error:
            raise translated from error

    def translate_error(self, error: BaseException) -> BaseException:
        """Return the error to raise in place of `error`.

        An error of this rank is returned as it is; the others read it in this rank's heartbeat and end too. An error
        that the end of another rank caused becomes a MachineError that says why that rank ended.
        """
        if self._world_size == 1 or self._outcome:
            return error
        if is_peer_failure(error):
            return self._peer_lost(error)
        # Should this process then hang, for a thread that does not come back, `_check` ends it after the time-out.
        self.finish(one_line(f"{type(error).__name__}: {error}", 300))
        # No report of a stop by a signal: all ranks agreed on it.
        if self._run is not None and not isinstance(error, StoppedError):
            self._write_report(printed=False)  # the caller prints the error
        return error

    def _peer_lost(self, error: BaseException) -> MachineError:
        """Find out which rank is lost: at once on its machine or if it wrote its error, else when it is silent."""
        if self._run is None:
            self._outcome = "another rank was lost"
            return MachineError(f"rank {self._rank} ends: another rank did, see its own line: {one_line(error)}")
        deadline = time.monotonic() + self._silence + 2 * self._interval
        while not self._report.exists() and time.monotonic() < deadline:
            self._write()
            if diagnose(self._heartbeats(), time.time(), self._silence).reason in ("failed", "died", "silent"):
                break
            time.sleep(self._interval)
        line = self._write_report()
        self.finish("ended as another rank was lost")
        return MachineError(f"rank {self._rank} ends: {line}")

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self._write()
            self._check()

    def _check(self) -> None:
        """End this process if it is stuck, or if another rank is lost."""
        phase = self._phase
        age = time.monotonic() - phase[2]
        if age > self._timeout:
            with contextlib.suppress(OSError):
                self._stack_file(self._rank).write_text(thread_stacks())
            # The other ranks find out at this time, too; the report then has their stacks.
            if not self._done.wait(2 * self._interval) and self._phase is phase:
                self._exit()
        elif self._outcome:
            return
        elif self._report.exists():
            # The loop mostly notices by itself, by a connection that breaks.
            self._done.wait(self._silence)
            if not self._outcome:
                self._exit()
        elif age > self._silence and any(beat and beat.has_died for beat in self._heartbeats(self._local_ranks)):
            # A rank of this machine was killed and the loop has not noticed, as may happen under NCCL.
            self._exit()

    def _exit(self) -> None:
        """End this process, whose loop does not come back."""
        line = f"rank {self._rank} ends: {self._write_report()}"
        if self._rank == 0 and (state := read_state(self._run)) is not None:
            write_state(self._run, state._replace(state="failed", error=line[:300], exit_code=MachineError.exit_code))
        print(f"ccmim: {line}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(MachineError.exit_code)

    def _write_report(self, printed: bool = True) -> str:
        """Write the report of this launch unless another rank has; return its headline and its path."""
        heartbeats = self._heartbeats()
        diagnosis = diagnose(heartbeats, time.time(), self._silence)
        own = self._report.with_suffix(f".{self._rank}")
        try:
            files = {rank: self._stack_file(rank) for rank in diagnosis.ranks or range(len(heartbeats))}
            stacks = {rank: file.read_text() for rank, file in files.items() if file.exists()}
            if not diagnosis.ranks:  # the main threads show which rank does not wait in the same place
                stacks = {rank: stack.partition("\n\n")[0] for rank, stack in stacks.items()}
            text = report(heartbeats, diagnosis, stacks)
            own.write_text(text)
            with contextlib.suppress(FileExistsError):
                os.link(own, self._report)  # the report appears whole, and once
                if printed:
                    print(f"\n{text}", file=sys.stderr, flush=True)
            own.unlink()
            return f"{self._report.read_text().partition(chr(10))[0]}; see {self._report}"
        except OSError:
            return headline(heartbeats, diagnosis)

    def _heartbeats(self, ranks: Sequence[int] = ()) -> list[Heartbeat | None]:
        return read_heartbeats(self._folder, self._launch, ranks or range(self._world_size))

    def _write(self) -> None:
        with self._write_lock:
            (phase, step, start), now = self._phase, time.time()
            began = now - (time.monotonic() - start)
            place = (self._launch, self._rank, *this_process())
            write_heartbeat(self._folder, Heartbeat(*place, step, phase, began, now, self._outcome))

    def _stack_file(self, rank: int) -> Path:
        return self._folder / f"rank_{rank}_stack.txt"


def is_peer_failure(error: BaseException) -> bool:
    """Return True if the end of another rank caused the error: NCCL and the store have a type for it, gloo has none."""
    of_gloo = isinstance(error, RuntimeError) and any(s in str(error) for s in ("gloo/", "caused pair closure"))
    return of_gloo or isinstance(error, dist.DistError)


def thread_stacks() -> str:
    """Return the stacks of this process's threads, the main thread first; without the caller and idle workers."""
    frames, names = sys._current_frames(), {}
    for thread in sorted(threading.enumerate(), key=lambda thread: thread is not threading.main_thread()):
        frame = frames.get(thread.ident)
        if frame is None or thread is threading.current_thread():
            continue
        calls = traceback.extract_stack(frame)
        if "work_queue.get" not in (calls[-1].line or ""):
            lines = [f"    {call.filename}:{call.lineno} {call.name}: {call.line}" for call in calls]
            names.setdefault("\n".join(lines), []).append(thread.name)
    return "\n\n".join(f"  {', '.join(same)}:\n{stack}" for stack, same in names.items())
