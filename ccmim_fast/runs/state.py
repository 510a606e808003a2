"""What a run says of itself: state.json in its folder, from its first step to its end. Needs no torch to be read."""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ccmim_fast.errors import CcmimError

FILE = "state.json"
STATES = ("running", "done", "stopped", "failed")
_SIGNAL = 128  # a process that signal n ended has the exit code 128 + n, as a shell counts
_ERROR_MAX = 300  # characters


class RunState(NamedTuple):
    """What state.json holds.

    Attributes:
        state: running, done (the last step was taken), stopped (ended in order before that) or failed.
        pid: the process of rank 0.
        host: its machine's name.
        started: when that process began, in clock ticks after its machine did: a pid is used again, both are not.
        error: one line; empty unless failed.
        exit_code: what the command ends with; None while running, and where the caller of `fit` decides.
    """

    state: str
    pid: int
    host: str
    started: int | None
    error: str = ""
    exit_code: int | None = None


@contextlib.contextmanager
def recorded(folder: Path, is_main: bool, finished: Callable[[], bool]) -> Iterator[None]:
    """Say in `folder` that this process runs, and how what is within ended. Ranks other than 0 say nothing.

    Args:
        folder: the run's folder.
        is_main: rank 0.
        finished: whether the last step was taken; asked if nothing was raised.
    """
    if not is_main:
        yield
        return
    now = RunState("running", os.getpid(), socket.gethostname(), process_start(os.getpid()))
    write_state(folder, now)
    try:
        yield
    except BaseException as error:
        write_state(folder, _ended_by(error, now))
        raise
    write_state(folder, now._replace(state="done", exit_code=0) if finished() else now._replace(state="stopped"))


def _ended_by(error: BaseException, now: RunState) -> RunState:
    if isinstance(error, KeyboardInterrupt):
        code = _SIGNAL + 2
    elif isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    else:
        code = getattr(error, "exit_code", 1)
    if code == 0 or code > _SIGNAL:
        return now._replace(state="stopped", exit_code=code)
    kind = "" if isinstance(error, CcmimError) else f"{type(error).__name__}: "
    line = " ".join(f"{kind}{error}".split())
    return now._replace(state="failed", exit_code=code, error=line[:_ERROR_MAX])


def write_state(folder: Path, state: RunState) -> None:
    """Write state.json so that a reader finds the old one or the new one, whole."""
    new = folder / f".{FILE}.new"
    # A full disk must neither end a run nor hide the error that did.
    with contextlib.suppress(OSError):
        new.write_text(json.dumps(state._asdict(), indent=1) + "\n")
        new.replace(folder / FILE)


def read_state(folder: Path) -> RunState | None:
    """What the run in `folder` said last; None where it said nothing, or nothing that can be read."""
    try:
        state = RunState(**json.loads((folder / FILE).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return state if state.state in STATES else None


def is_alive(state: RunState) -> bool | None:
    """Whether the process that wrote `state` is there; None if it is another machine's."""
    if state.host != socket.gethostname():
        return None
    started = process_start(state.pid)
    return started is not None and started == state.started


def process_start(pid: int) -> int | None:
    """When process `pid` of this machine began, in clock ticks after the machine did; None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (OSError, ValueError):
        return None
    # Behind the name, which is in brackets and may hold some: field 3 is the state, field 22 the start (proc(5)).
    fields = stat.rpartition(")")[2].split()
    # A zombie ended; only its parent has not asked how.
    return int(fields[19]) if fields[0] not in ("Z", "X") else None
