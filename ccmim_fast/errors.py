"""User errors: each one ends the command with one line and its own exit code, without a traceback."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from ccmim_fast.secrets import without_secrets

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


class StoppedError(CcmimError):
    """A signal asked the run to stop, and it stopped with everything saved: this is no mistake."""

    exit_code = 143


class MachineError(CcmimError):
    """The machine lacks a device, a library or a permission that the command needs."""

    exit_code = 6


def exit_code_of(run: Callable[[], Any]) -> int:
    """Call `run`; returns 0, or what its error ends a command with, after printing the error's line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files may be bytes that are no text: they are printed as they are, in every locale.
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        run()
        sys.stdout.flush()
    except BrokenPipeError:
        # A reader that went away (`| head`) is nobody's mistake. What is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except CcmimError as error:
        return _end(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _end("interrupted", 128 + signal.SIGINT)
    except OSError as error:
        # What no command has an advice for, but no mistake of ours: a full disk, too many open files, a lost right.
        if error.errno is None:
            raise
        where = f"{error.filename!r}: " if error.filename is not None else ""
        kind = ConfigError if error.errno == errno.ENAMETOOLONG else MachineError
        return _end(f"{where}{error.strerror}", kind.exit_code)
    return 0


def _end(line: str, code: int) -> int:
    """Print one line that a terminal shows as it is, whatever words of the user are in it."""
    line = printable(one_line(without_secrets(line), LINE + 1))
    print(f"ccmim: {line if len(line) <= LINE else line[:LINE] + '...'}", file=sys.stderr)
    return code


def one_line(text: object, limit: int | None = 200) -> str:
    """Return `text` (an error, mostly) on one line, cut after `limit` characters."""
    return " ".join(str(text).split())[:limit]


def printable(text: str) -> str:
    """Return `text` as a terminal may show it: what would control the terminal, or is no text, is written out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
