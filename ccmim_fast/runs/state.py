"""state.json: the run's folder says from the first step to the end how the run stands. Imports no torch."""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ccmim_fast.errors import as_user_error, one_line
from ccmim_fast.secrets import without_secrets

CONFIG, METRICS, FILE = "config.yaml", "metrics.jsonl", "state.json"  # in a run's folder
ENVIRONMENT = "environment.json"
STATES = ("running", "done", "stopped", "failed")
_SIGNAL = 128  # a process that signal n ended has the exit code 128 + n, as a shell counts

Record = TypeVar("Record")


class RunState(NamedTuple):
    """The content of state.json; `pid`, `host` and `started` tell the process of rank 0."""

    state: str  # running, done (the last step was taken), stopped (ended in order before that) or failed
    pid: int
    host: str
    started: int | None  # clock ticks since boot, as a pid alone is used again
    error: str = ""  # one line; empty unless failed
    exit_code: int | None = None  # of the command; None while running, and where the caller of `fit` decides


@contextlib.contextmanager
def recorded(folder: Path, is_main: bool, finished: Callable[[], bool]) -> Iterator[None]:
    """Record in the run's `folder` that this process runs, and how the body ended; ranks other than 0 record nothing.

    `finished` tells if the last step was taken; it is called if nothing was raised.
    """
    if not is_main:
        yield
        return
    host, pid, started = this_process()
    running = RunState("running", pid, host, started)
    write_state(folder, running)
    try:
        yield
    except BaseException as error:
        write_state(folder, _after_error(error, running))
        raise
    ended = running._replace(state="done", exit_code=0) if finished() else running._replace(state="stopped")
    write_state(folder, ended)


def _after_error(error: BaseException, running: RunState) -> RunState:
    if isinstance(error, KeyboardInterrupt):
        code = _SIGNAL + 2
    elif isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    else:
        code = getattr(error, "exit_code", 1)
    if code == 0 or code > _SIGNAL:
        return running._replace(state="stopped", exit_code=code)
    if (told := as_user_error(error)) is None:
        words = f"{type(error).__name__}: {error}"
    else:
        words, code = str(told), told.exit_code
    return running._replace(state="failed", exit_code=code, error=one_line(without_secrets(words), 300))


def write_state(folder: Path, state: RunState) -> None:
    write_record(folder / FILE, state)


def read_state(folder: Path) -> RunState | None:
    """Return the last state of the run in `folder`; None where there is none, or none that can be read."""
    state = read_record(folder / FILE, RunState)
    return state if state is not None and state.state in STATES else None


def write_record(path: Path, record: Any) -> None:
    """Write a NamedTuple as JSON so that a reader finds the old record or the new one, whole."""
    # A full disk must neither end a run nor hide the error that did.
    with contextlib.suppress(OSError):
        write_whole(path, json.dumps(record._asdict(), indent=1) + "\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its old form, which it replaces then: where it fails, with an OSError, the old one stays."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def read_record(path: Path, kind: type[Record]) -> Record | None:
    """Return the NamedTuple that `write_record` wrote; None where the file is missing, damaged or of another kind."""
    try:
        return kind(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def this_process() -> tuple[str, int, int | None]:
    """Return host, pid and start of this process."""
    return socket.gethostname(), os.getpid(), process_start(os.getpid())


def is_alive(process: Any) -> bool | None:
    """Return True if the process of a record (`host`, `pid`, `started`) still runs; None if on another machine."""
    if process.host != socket.gethostname():
        return None
    started = process_start(process.pid)
    return started is not None and started == process.started


def process_start(pid: int) -> int | None:
    """Return when process `pid` of this machine began, in clock ticks since boot; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (OSError, ValueError):
        return None
    # The name stands in brackets and may hold some itself; after it, field 3 is the state, 22 the start (proc(5)).
    fields = stat.rpartition(")")[2].split()
    # A zombie has ended; its parent has not collected the exit code yet.
    return int(fields[19]) if fields[0] not in ("Z", "X") else None
