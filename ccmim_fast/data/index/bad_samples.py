"""This module records the samples that fail in a run: in memory, and for later runs as JSON lines beside the index."""

import contextlib
import json
import threading
from collections.abc import Iterator

from ccmim_fast.data.index.index_file import Index
from ccmim_fast.data.index.own import open_regular
from ccmim_fast.data.source import Source
from ccmim_fast.errors import DataError


def bad_samples_path(index_path: str) -> str:
    """Return the path of the file of bad samples that belongs to an index."""
    return f"{index_path}.bad"


def read_json_lines(path: str, index: Index, *keys: str) -> Iterator[tuple]:
    """Yield the values of `keys` in each whole record of this state of the index; nothing if the file is missing."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace", opener=open_regular) as file:
        for line in file:
            with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
                record = json.loads(line)
                if record["index"] == index.fingerprint:
                    yield tuple(record[key] for key in keys)


def read_bad_samples(index: Index) -> dict[int, str]:
    """Return the reason by sample id, as earlier runs have recorded it; what is no record is passed over."""
    records = read_json_lines(bad_samples_path(index.path), index, "id", "reason")
    return {sample: reason for sample, reason in records if is_record(index, sample, reason)}


def is_record(index: Index, sample: object, reason: object) -> bool:
    """Tell whether a sample and a reason that were read from a file are what this program writes."""
    number = type(sample) is int and 0 <= sample < len(index)
    return number and isinstance(reason, str) and bool(reason.strip())


class BadSamples:
    """This class records the samples of one run that failed; many threads may use it.

    They are recorded for the next run beside the source's index, if it has one. A share of `max_bad` of the samples may
    be unusable; DataError if more are, or, with `on_error` = `error`, at the first.
    """

    def __init__(self, source: Source, on_error: str, max_bad: float):
        self._index = getattr(source, "index", None)
        # A source excludes samples that are of no use, too, such as images without a label or an object: no bad ones.
        lost = 0 if self._index is None else self._index.lost
        self._excluded = 0 if self._index is None else len(self._index.excluded_X) + lost
        self._total = len(source) + lost
        self._on_error, self._max_bad, self._lock = on_error, max_bad, threading.Lock()
        self.reasons: dict[int, str] = {}  # by sample id, in the order in which the samples failed
        # Reasons of earlier runs, by sample id.
        self.known = {} if self._index is None else read_bad_samples(self._index)
        self._check()

    def add(self, sample: int, reason: str, lasting: bool = True) -> None:
        """Record that a sample failed, for the next run too if `lasting`. Raises DataError if that ends this one."""
        if self._on_error == "error":
            raise DataError(f"{reason}; data.on_error=skip goes on without it")
        with self._lock:
            if sample in self.reasons:
                return
            self.reasons[sample] = reason
            if lasting and sample not in self.known and self._index is not None:
                line = json.dumps({"index": self._index.fingerprint, "id": sample, "reason": reason}) + "\n"
                path = bad_samples_path(self._index.path)
                # One unbuffered write of a short line at the end: several ranks may append at once. In a read-only
                # place nothing is written: the next run finds the bad sample again.
                with contextlib.suppress(OSError), open(path, "ab", buffering=0, opener=open_regular) as file:
                    file.write(line.encode())
        self._check(f", the last {reason}")

    def _check(self, last: str = "") -> None:
        bad = self._excluded + len(self.reasons)
        if bad > self._max_bad * self._total:
            raise DataError(
                f"{bad} of {self._total} samples cannot be used, more than data.max_bad={self._max_bad:g}{last}; "
                "ccmim data verify lists them"
            )
