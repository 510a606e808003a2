"""Signals that ask a run to stop: they set a flag, and the run stops when its step is done."""

import signal
from types import FrameType

_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Within it SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C are requests; a second Ctrl-C interrupts at once.

    Attributes:
        name: of the signal that came, empty before.
    """

    def __init__(self) -> None:
        self.name, self._before = "", {}

    def __enter__(self) -> "StopSignals":
        try:
            self._before = {number: signal.signal(number, self._asked) for number in _ASKING}
        except ValueError:  # not the main thread: nobody can install handlers there
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
