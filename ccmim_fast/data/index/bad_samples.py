"""Samples that did not decode, put down beside the index as they are met: an append-only file of JSON lines."""

import json
import os
import threading

from ccmim_fast.data.index.index_file import Index
from ccmim_fast.errors import DataError


def marks_path(index_path: str) -> str:
    """Where the marks of an index are."""
    return f"{index_path}.bad"


def read_marks(index: Index) -> dict[int, str]:
    """Reason by sample id. Lines of another state of the index, or cut off, do not count."""
    marks = {}
    try:
        with open(marks_path(index.path), encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    said = json.loads(line)
                    if said["index"] == index.fingerprint and 0 <= said["id"] < len(index):
                        marks[said["id"]] = said["reason"]
                except (ValueError, KeyError, TypeError):
                    continue
    except OSError:
        pass  # none yet, or a place of somebody else's
    return marks


class Skipped:
    """Samples of one run that could not be shown; may be used by many threads.

    Args:
        index: where they are marked for the next run; None: nowhere.
        total: samples indexed, usable or not.
        bad: how many of them were known as unusable before.
        on_error: `skip` or `error`.
        most: share of `total` that may be bad.

    Attributes:
        reasons: by sample id, in the order they were met.
    """

    def __init__(self, index: Index | None, total: int, bad: int, on_error: str, most: float):
        self._index, self._total, self._bad, self._on_error, self._most = index, total, bad, on_error, most
        self._lock = threading.Lock()
        self.reasons: dict[int, str] = {}
        self.known = read_marks(index) if index is not None else {}
        self._check("")

    def add(self, sample: int, reason: str, lasting: bool = True) -> None:
        """Put down that a sample failed; for the next run too where the cause is `lasting`.

        Raises:
            DataError: nothing may fail, or more than the allowed share did.
        """
        if self._on_error == "error":
            raise DataError(f"{reason}; data.on_error=skip goes on without it")
        with self._lock:
            if sample in self.reasons:
                return
            self.reasons[sample] = reason
            if lasting and sample not in self.known and self._index is not None:
                self._mark(sample, reason)
        self._check(f", the last {reason}")

    def _check(self, last: str) -> None:
        bad = self._bad + len(self.reasons)
        if bad > self._most * self._total:
            raise DataError(
                f"{bad} of {self._total} samples cannot be used, more than data.max_bad={self._most:g}{last}; "
                "ccmim data verify lists them"
            )

    def _mark(self, sample: int, reason: str) -> None:
        line = json.dumps({"index": self._index.fingerprint, "id": sample, "reason": reason}) + "\n"
        try:
            # One write of a short line at the end: several ranks may do so at once.
            descriptor = os.open(marks_path(self._index.path), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            os.write(descriptor, line.encode())
            os.close(descriptor)
        except OSError:
            pass  # a read-only place: the next run finds out again
