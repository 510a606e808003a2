"""The user's errors: each ends the command with one line and its own exit code, never with a traceback."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

LINE = 1000  # characters; a line of ours has 400 at most, and the user's words in it are without end


class CcmimError(Exception):
    """Base of every error a user can cause; `exit_code` is what the command ends with."""

    exit_code = 1


class ConfigError(CcmimError):
    """A wrong option, key or value. The message names the key, the value and the nearest valid one."""

    exit_code = 2


class DataError(CcmimError):
    """Images that are missing, unreadable or too few."""

    exit_code = 3


class NumericsError(CcmimError):
    """A loss or gradient that is not finite and stays so."""

    exit_code = 4


class CheckpointError(CcmimError):
    """A checkpoint that is damaged, hostile, or belongs to another model."""

    exit_code = 5


class StoppedError(CcmimError):
    """No mistake: a signal asked the run to stop, and it did, with everything saved."""

    exit_code = 143


class MachineError(CcmimError):
    """A device, library or right that the command needs and the machine lacks."""

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
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(line.split()))
    print(f"ccmim: {line if len(line) <= LINE else line[:LINE] + '...'}", file=sys.stderr)
    return code
