"""User errors: each one ends the command with one line and its own exit code, without a traceback."""

import contextlib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

from ccmim_fast.secrets import without_secrets

CPU_MEMORY = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")  # torch, on a CPU
_lost: list[int] = []  # errors of standard output so far
_WORKER = re.compile(r"DataLoader worker .*killed by signal: ([\w ]+)")
LINE = 1000  # characters; a line of ours has 400 at most, and the user's words in it are without end


class CcmimError(Exception):
    """This class is the base of every error that a user can cause; the command ends with `exit_code`."""

    exit_code = 1


class ConfigError(CcmimError):
    """An option, key or value is wrong. The message names the key, the value and the nearest valid value."""

    exit_code = 2


class DataError(CcmimError):
    """Images are missing, unreadable or too few."""

    exit_code = 3


class NumericsError(CcmimError):
    """A loss or gradient is not finite and stays so."""

    exit_code = 4


class CheckpointError(CcmimError):
    """A checkpoint is damaged, hostile, or belongs to another model."""

    exit_code = 5


class UnreadableError(CheckpointError):
    """A checkpoint is there, and cannot be read at this moment: no permission, a failing disk, too many open files."""


class StoppedError(CcmimError):
    """A signal asked the run to stop, and it stopped with everything saved: this is no mistake."""

    exit_code = 143


class MachineError(CcmimError):
    """The machine lacks a device, a library or a permission that the command needs."""

    exit_code = 6


def exit_code_of(run: Callable[[], Any]) -> int:
    """Call `run`; returns 0, or what its error ends a command with, after printing the error's line."""
    _open_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files may be bytes that are no text: they are printed as they are, in every locale.
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        run()
        _flush()
    except BrokenPipeError:
        # A reader that went away (`| head`) is nobody's mistake.
        mute()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return _end("interrupted", 128 + signal.SIGINT)
    except Exception as error:
        if (told := as_user_error(error)) is None:
            raise
        return _end(str(told), told.exit_code)
    return 0


def as_user_error(error: BaseException) -> CcmimError | None:
    """Return the error that the command ends with, which has a line and an exit code; None: it is a mistake of ours."""
    if isinstance(error, CcmimError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        # What no command has an advice for, but no mistake of ours: a full disk, too many open files, a lost right.
        where = f"{error.filename!r}: " if error.filename is not None else ""
        kind = ConfigError if error.errno == errno.ENAMETOOLONG else MachineError
        return kind(f"{where}{error.strerror}")
    if isinstance(error, MemoryError) or CPU_MEMORY.search(str(error)):
        return MachineError(
            f"out of the host's memory: {one_line(str(error)) or 'no more was to be had'}; use a smaller batch"
        )
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported here
        return MachineError(f"out of the device's memory: {one_line(error)}; use a smaller batch")
    if found := _WORKER.search(str(error)):
        return MachineError(
            f"a loading process ended by a signal ({found[1]}): the host's memory, or /dev/shm, is full; "
            "use a smaller batch or fewer data.workers"
        )
    return None


def say(line: str) -> None:
    """Print a line. Where it cannot be printed the work goes on: the reader is gone, the disk of a log is full.

    The first line that finds the disk full is told on standard error.
    """
    try:
        print(printable(line), flush=True)
    except BrokenPipeError:
        mute()
    except OSError as error:
        if not _lost:
            _end(f"standard output: {error.strerror}; the work goes on, and lines are missing there", 0)
        _lost.append(error.errno)


def mute() -> None:
    """Let what is printed from now on, and what is left in the buffer, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """Return a text without passwords of URLs, and that no terminal takes for commands; its lines stay lines."""
    return "".join(
        c if c.isprintable() or c in "\n\t" or "\udc80" <= c <= "\udcff" else ascii(c)[1:-1]
        for c in without_secrets(text)
    )


def as_text(name: str) -> str:
    """Return the name of a file as a text that any file holds: bytes in it that are no text become question marks."""
    return name.encode(errors="replace").decode()


def _open_standard_streams() -> None:
    """Let streams that were closed (`>&-`) go nowhere: the next file that is opened would get what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        mute()
        raise MachineError(f"standard output: {error.strerror}; not all was printed") from None


def _end(line: str, code: int) -> int:
    """Print one line that a terminal shows as it is, whatever words of the user are in it."""
    line = printable(one_line(line, LINE + 1))
    with contextlib.suppress(OSError):
        print(f"ccmim: {line if len(line) <= LINE else line[:LINE] + '...'}", file=sys.stderr, flush=True)
    return code


def one_line(text: object, limit: int | None = 200) -> str:
    """Return `text` (an error, mostly; one without words by its kind) on one line, cut after `limit` characters."""
    words = str(text).split()
    return " ".join(words if words or not isinstance(text, BaseException) else [type(text).__name__])[:limit]
