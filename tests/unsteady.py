"""A source for worker processes, some of whose samples are bad, and some of which end their process."""

import os
from typing import NamedTuple

from ccmim_fast.errors import DataError


class Unsteady(NamedTuple):
    """bad: sample ids that raise. deadly: those at which the process ends, as if its decoder had crashed."""

    bad: tuple[int, ...] = ()
    deadly: tuple[int, ...] = ()

    def open(self) -> "Unsteady":
        """As a process does; pickled with the source."""
        return self

    def decode(self, index):
        if index in self.deadly:
            os._exit(11)
        if index in self.bad:
            raise DataError(f"cannot decode 'sample {index}': it is bad")


class Broken(NamedTuple):
    """No process can open it."""

    def open(self):
        os._exit(12)
