"""Signals that ask a run to stop: they set a flag, and the run stops when its step is done."""

import contextlib
import signal
from types import FrameType

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Within this context SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C only set `name`; a second Ctrl-C interrupts.

    With `keep_after_error` the handlers stay in place after an error, until the process ends: when a rank is lost, the
    launcher ends the other ranks, which still have to write their diagnosis.
    """

    def __init__(self, keep_after_error: bool = False) -> None:
        self.name, self._previous, self._keep_after_error = "", {}, keep_after_error

    def __enter__(self) -> "StopSignals":
        with contextlib.suppress(ValueError):  # Python installs handlers in the main thread only
            self._previous = {number: signal.signal(number, self._handle) for number in _STOP_SIGNALS}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and self._keep_after_error:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
