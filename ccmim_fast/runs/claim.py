"""One process at a time works in a folder. Its lock is freed by the kernel, however the process ends.

The lock file tells who holds the lock, and its time is set again and again. This is for disks that know no locks across
machines: there a process of another machine is known by its signs of life alone. Imports no torch.
"""

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ccmim_fast.errors import CcmimError, ConfigError, MachineError
from ccmim_fast.runs.state import RunState, is_alive, read_record, this_process

LOCK = ".ccmim.lock"
_BEAT = 15.0  # seconds between two signs of life
_WATCHED = 60.0  # seconds in which a process of another machine shows one, if it lives; clocks are not compared


class Holder(NamedTuple):
    """The content of the lock file: a process; see `state.RunState`."""

    host: str
    pid: int
    started: int | None


@contextlib.contextmanager
def claimed(folder: Path, label: str) -> Iterator[None]:
    """Be the one process that works in `folder`, which is made as by `folder_made`; `label` names it in messages.

    Raises ConfigError where another process works in the folder, or where it cannot be written; MachineError where the
    disk is full.
    """
    with folder_made(folder, label), contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(folder, label))
        except OSError as error:
            raise _unwritable(label, error) from None
        yield


@contextlib.contextmanager
def folder_made(folder: Path, label: str) -> Iterator[None]:
    """Make `folder` if it is missing; where the body raises, folders that were made and are empty go again.

    Raises ConfigError or MachineError where it cannot be made.
    """
    made: list[Path] = []
    try:
        try:
            _make(folder, made)
        except OSError as error:
            raise _unwritable(label, error) from None
        yield
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
        raise


def is_watched_alive(paths: list[Path]) -> bool:
    """Return whether one of the files is written within a minute, by whatever machine."""
    before, deadline = [_time_of(path) for path in paths], time.monotonic() + _WATCHED
    while time.monotonic() < deadline:
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
        if before != [_time_of(path) for path in paths]:
            return True
    return False


def holder_of(folder: Path) -> Holder | None:
    """Return who holds the lock of `folder`, or held it when it was killed; None: nobody, ended in order."""
    return read_record(folder / LOCK, Holder)


def in_use(label: str, holder: Holder | RunState | None) -> ConfigError:
    """Return the error for a folder in which another process works."""
    who = f"process {holder.pid} on {holder.host}" if holder is not None else "another process"
    return ConfigError(f"{label}: {who} is at work in it; wait for its end, or choose another folder")


def _make(folder: Path, made: list[Path]) -> None:
    """Make the folder, and add to `made` what was missing of its path, the uppermost first."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        _make(folder.parent, made)
    with contextlib.suppress(FileExistsError):  # another process was faster; or it is no folder, as `open` then says
        folder.mkdir()
        made.append(folder)


def _unwritable(label: str, error: OSError) -> CcmimError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(f"{label}: cannot be written: {error.strerror}; make room, or choose another folder")
    return ConfigError(f"{label}: cannot be written: {error.strerror}; choose another folder")


@contextlib.contextmanager
def _locked(folder: Path, label: str) -> Iterator[None]:
    path, ended = folder / LOCK, threading.Event()
    descriptor = _open_locked(path, label)
    beat = threading.Thread(target=_beat, args=(descriptor, ended), name="lock", daemon=True)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(Holder(*this_process())._asdict()).encode())
        beat.start()
        yield
    finally:
        ended.set()
        if beat.ident is not None:
            beat.join()
        # While it is held: who opened the file meanwhile finds that it is not the folder's any more.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _open_locked(path: Path, label: str) -> int:
    """Return the descriptor of the open and locked file."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise in_use(label, read_record(path, Holder)) from None
        except OSError:  # a file system without locks: its word is all there is
            holder = read_record(path, Holder)
            if holder is not None and is_alive(holder):
                os.close(descriptor)
                raise in_use(label, holder) from None
        if _is_named(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    """Return whether the open file still has its name: who held the lock before may have removed it."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _time_of(path: Path) -> int:
    """Return when the file was written, asked of the disk that other machines write, too; 0: it is not there."""
    try:
        # Opened: a network's file system answers from its memory otherwise.
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0
