"""The user's errors: each ends the command with one line and its own exit code, never with a traceback."""


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
