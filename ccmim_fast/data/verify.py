"""Every image decoded whole, by all cores: what fails is marked as bad in the index."""

import json
import multiprocessing
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ccmim_fast.data.index.bad_samples import bad_samples_path, read_bad_samples
from ccmim_fast.data.index.index_file import BAD, INDEXED, SCHEMA, VERIFIED, Index, rewrite_index
from ccmim_fast.data.index.indexed import IndexedSource
from ccmim_fast.data.source import Source
from ccmim_fast.errors import DataError, MachineError

_CHUNK = 64  # samples a task takes: what is decoded once more when a decoder crashes
# How errors name a sample: `cannot decode 'a.jpg': `, `'a.jpg' `.
_NAME = re.compile(r"""^(?:cannot (?:read|decode) )?(['"])(?:\\.|(?!\1).)*\1:? """)

Bad = list[tuple[int, str]]  # sample ids and reasons


class Report(NamedTuple):
    """What an index holds after all of it was decoded.

    Attributes:
        samples: rows of the index.
        bad: ids and reasons of those that cannot be used.
        reasons: how many there are of each kind of reason.
        modes: how many samples there are of each mode of pixels.
    """

    samples: int
    bad: Bad
    reasons: Counter
    modes: dict[str, int]


def verify(
    index: Index, processes: int = 0, again: bool = False, report: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Decode every sample that was not decoded whole before, and write what was found into the index.

    May be stopped at any time; the next call goes on.

    Args:
        processes: 0: one per core.
        again: those too that were decoded before, or failed.
        report: called now and then with the samples done, and all.

    Raises:
        DataError: the index's folder cannot be written to.
        MachineError: no process can be started.
    """
    wanted = _wanted(index, again)
    log = f"{index.path}.verify"
    done, bad = _read_log(log, index)
    left = wanted[~np.isin(wanted, done)]
    chunks = [left[start : start + _CHUNK].tolist() for start in range(0, len(left), _CHUNK)]
    finished = len(wanted) - len(left)
    decoded = _decode_chunks(partial(_open_index, index.path), chunks, processes or os.cpu_count() or 1)
    try:
        with open(log, "a", encoding="utf-8") as file, closing(decoded):
            for chunk, found in decoded:
                file.write(json.dumps({"index": index.fingerprint, "done": chunk, "bad": found}) + "\n")
                file.flush()
                bad += found
                finished += len(chunk)
                report(finished, len(wanted))
        index = _write_status(index, np.union1d(wanted, done), dict(bad))
        for path in (log, bad_samples_path(index.path)):
            if os.path.exists(path):
                os.unlink(path)
    except OSError as error:
        raise DataError(f"cannot write {log!r}: {error.strerror}; name another place for the index") from error
    return summary(index)


def summary(index: Index) -> Report:
    """What an index holds, as far as it is known."""
    bad = [(number, without_name(index.reason(number))) for number in index.excluded_X.tolist()]
    return Report(len(index), bad, Counter(kind_of(reason) for _, reason in bad), index.modes())


def without_name(reason: str) -> str:
    """A reason without the sample's name before it."""
    return _NAME.sub("", reason)


def kind_of(reason: str) -> str:
    """A reason without what differs from sample to sample: its name, and N for every number."""
    return re.sub(r"\d+(?:[.,]\d+)*", "N", without_name(reason))


def _wanted(index: Index, again: bool) -> np.ndarray:
    """Ids to decode, ascending; what has no header that can be read is not tried again."""
    if again:
        return np.flatnonzero(index.sizes_N2[:, 0] > 0)
    marked = np.fromiter(read_bad_samples(index), dtype=np.int64)
    return np.union1d(np.flatnonzero(index.status_N == INDEXED), marked)


def _decode_chunks(
    open_source: Callable[[], Source], chunks: list[list[int]], processes: int
) -> Iterator[tuple[list[int], Bad]]:
    """Each chunk with what is bad in it, as it is done. Those that may have killed a process come last.

    Args:
        open_source: called once in every process; it can be pickled.
    """
    crashed = []
    waiting = list(chunks)
    while waiting:
        pool = _pool(open_source, processes)
        try:
            tasks = {pool.submit(_decode, chunk): chunk for chunk in waiting}
            waiting = []
            for task in as_completed(tasks):
                try:
                    yield tasks[task], task.result()
                except BrokenProcessPool:
                    # All that were not done yet end so; one of the first of them, as many as processes, is the cause.
                    waiting.append(tasks[task])
        finally:
            # Whoever stops does not wait for what was not begun.
            pool.shutdown(cancel_futures=True)
        waiting.sort()
        crashed += waiting[: processes + 1]
        waiting = waiting[processes + 1 :]
    for chunk in crashed:
        yield chunk, _decode_alone(open_source, chunk)


def _decode_alone(open_source: Callable[[], Source], numbers: list[int]) -> Bad:
    """What is bad of some samples, in a process of their own; if it dies, each half in one, down to the sample."""
    with _pool(open_source, 1) as pool:
        try:
            pool.submit(_decode, []).result()
        except BrokenProcessPool as error:
            raise MachineError("no process to decode images in can be started, or it ends at once") from error
        try:
            return pool.submit(_decode, numbers).result()
        except BrokenProcessPool:
            if len(numbers) == 1:
                return [(numbers[0], "its decoder crashed")]
    middle = len(numbers) // 2
    return _decode_alone(open_source, numbers[:middle]) + _decode_alone(open_source, numbers[middle:])


def _pool(open_source: Callable[[], Source], processes: int) -> ProcessPoolExecutor:
    # Not forked: a copy of a process with threads may wait for ever for a lock that none of its own holds.
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (open_source,))


_source: Source | None = None  # of a worker process


def _start(open_source: Callable[[], Source]) -> None:
    global _source
    # Ctrl-C reaches every process of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _source = open_source()


def _open_index(path: str) -> IndexedSource:
    return IndexedSource(Index(path))


def _decode(numbers: list[int]) -> Bad:
    bad = []
    for number in numbers:
        try:
            _source.decode(number)
        except (DataError, MemoryError) as error:
            bad.append((number, without_name(str(error)) or "too little memory"))
    return bad


def _read_log(path: str, index: Index) -> tuple[np.ndarray, Bad]:
    """What a call that was stopped had done: ids, and the bad ones among them."""
    done, bad = [], []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    said = json.loads(line)
                except ValueError:
                    continue  # the line at which it was stopped
                if said["index"] == index.fingerprint:
                    done += said["done"]
                    bad += [tuple(pair) for pair in said["bad"]]
    return np.array(done, dtype=np.int64), bad


def _write_status(index: Index, decoded: np.ndarray, bad: dict[int, str]) -> Index:
    """The index with what was found of the samples that were decoded."""
    status_N = index.status_N.copy()
    reasons = index.table.column("reason").to_pylist()
    for number in decoded[status_N[decoded] == BAD].tolist():
        reasons[number] = None
    status_N[decoded] = VERIFIED
    for number, reason in bad.items():
        status_N[number], reasons[number] = BAD, reason
    return rewrite_index(
        index, {"status": pa.array(status_N), "reason": pa.array(reasons, SCHEMA.field("reason").type)}
    )
