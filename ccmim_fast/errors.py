"""User errors: each one ends the command with one line and its own exit code, without a traceback."""


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


def one_line(text: object, limit: int = 200) -> str:
    """Return `text` (an error, mostly) on one line of at most `limit` characters."""
    return " ".join(str(text).split())[:limit]
