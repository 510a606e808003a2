"""Signals that ask a run to stop: they set a flag, and the run stops when its step is done."""

import signal
from types import FrameType

_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Within it SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C are requests; a second Ctrl-C interrupts at once.

    Args:
        to_the_end: so they are after an error, too, until the process ends: a launcher ends the ranks that are left
            when one is lost, and they have last words.

    Attributes:
        name: of the signal that came, empty before.
    """

    def __init__(self, to_the_end: bool = False) -> None:
        self.name, self._before, self._to_the_end = "", {}, to_the_end

    def __enter__(self) -> "StopSignals":
        try:
            self._before = {number: signal.signal(number, self._asked) for number in _ASKING}
        except ValueError:  # not the main thread: nobody can install handlers there
            self._before = {}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and self._to_the_end:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
