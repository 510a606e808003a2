"""This module checks an index: all cores decode every image, and what fails is marked as bad in the index."""

import contextlib
import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ccmim_fast.data.index.bad_samples import bad_samples_path, is_record, read_bad_samples, read_json_lines
from ccmim_fast.data.index.index_file import BAD, INDEXED, VERIFIED, Index, rewrite_index
from ccmim_fast.data.index.indexed import IndexedSource
from ccmim_fast.data.index.left_out import kind_of, without_name
from ccmim_fast.data.index.own import open_regular
from ccmim_fast.data.source import Source
from ccmim_fast.errors import DataError, MachineError

_CHUNK = 64  # samples of a task; they are decoded once more when a decoder crashes

Bad = list[tuple[int, str]]  # sample ids and reasons


class Report(NamedTuple):
    """The report sums up an index."""

    samples: int  # number of rows
    bad: Bad  # those that cannot be used
    reasons: Counter  # counts by kind of reason
    modes: Counter  # counts by mode of the pixels


def verify(
    index: Index,
    processes: int = 0,
    again: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
    origin: str = "",
) -> Report:
    """Decode every sample that was not decoded whole before (`again`: or was, or failed), and update the index.

    `origin` is what the user has named, if that is a URL with a password. With 0 `processes` there is one per core. The
    call may be stopped at any time; the next call goes on. Raises DataError if the index's folder cannot be written to,
    MachineError if no process can be started.
    """
    if again:  # all but those whose header cannot be read
        wanted = np.flatnonzero(index.sizes_N2[:, 0] > 0)
    else:
        recorded = np.fromiter(read_bad_samples(index), dtype=np.int64)
        wanted = np.union1d(np.flatnonzero(index.status_N == INDEXED), recorded)
    log = f"{index.path}.verify"
    done, bad = [], []
    for ids, found in read_json_lines(log, index, "done", "bad"):  # of a call that was stopped
        if isinstance(ids, list) and isinstance(found, list) and all(is_record(index, one, "done") for one in ids):
            done += ids
            bad += (tuple(one) for one in found if isinstance(one, list) and len(one) == 2 and is_record(index, *one))
    left = np.setdiff1d(wanted, done)
    chunks = [left[start : start + _CHUNK].tolist() for start in range(0, len(left), _CHUNK)]
    finished = len(wanted) - len(left)
    decoded = _decode_chunks(partial(_open_index, index.path, origin), chunks, processes or os.cpu_count() or 1)
    try:
        with open(log, "a", encoding="utf-8", opener=open_regular) as file, contextlib.closing(decoded):
            # A call that is stopped before its first chunk leaves no empty file, which would be nobody's.
            file.write(json.dumps({"index": index.fingerprint, "done": [], "bad": []}) + "\n")
            file.flush()
            for chunk, found in decoded:
                file.write(json.dumps({"index": index.fingerprint, "done": chunk, "bad": found}) + "\n")
                file.flush()
                bad += found
                finished += len(chunk)
                report(finished, len(wanted))
        decoded_ids = np.union1d(wanted, np.array(done, dtype=np.int64))
        status_N, reasons_N = index.status_N.copy(), np.array(index.table.column("reason").to_pylist(), dtype=object)
        status_N[decoded_ids], reasons_N[decoded_ids] = VERIFIED, None
        for sample, reason in bad:
            status_N[sample], reasons_N[sample] = BAD, reason
        columns = {"status": pa.array(status_N), "reason": pa.array(reasons_N, pa.large_string())}
        index = rewrite_index(index, columns)
        for path in (log, bad_samples_path(index.path)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    except OSError as error:
        raise DataError(f"cannot write {log!r}: {error.strerror}; name another place for the index") from error
    return summary(index)


def summary(index: Index) -> Report:
    """Return what an index holds, as far as it is known."""
    bad = [(sample, without_name(index.reason(sample))) for sample in index.excluded_X.tolist()]
    return Report(len(index), bad, Counter(kind_of(reason) for _, reason in bad), index.modes())


def _decode_chunks(
    open_source: Callable[[], Source], chunks: list[list[int]], processes: int
) -> Iterator[tuple[list[int], Bad]]:
    """Yield each chunk with its bad samples, as it is done; chunks that may have crashed a process come last.

    `open_source` is called once in every process, so that it must be picklable.
    """
    crashed, waiting = [], chunks
    while waiting:
        pool = _pool(open_source, processes)
        try:
            tasks, waiting = {pool.submit(_decode, chunk): chunk for chunk in waiting}, []
            for task in as_completed(tasks):
                try:
                    yield tasks[task], task.result()
                except BrokenProcessPool:
                    # All unfinished chunks end so; one of the first, as many as there are processes, is the cause.
                    waiting.append(tasks[task])
        finally:
            # A caller that stops does not wait for chunks that have not begun.
            pool.shutdown(cancel_futures=True)
        waiting.sort()
        crashed, waiting = crashed + waiting[: processes + 1], waiting[processes + 1 :]
    for chunk in crashed:
        yield chunk, _decode_alone(open_source, chunk)


def _decode_alone(open_source: Callable[[], Source], samples: list[int]) -> Bad:
    """Decode samples in a separate process; if it crashes, each half in one, down to the single sample."""
    with _pool(open_source, 1) as pool:
        try:
            pool.submit(_decode, []).result()
        except BrokenProcessPool as error:
            raise MachineError("no process to decode images in can be started, or it ends at once") from error
        try:
            return pool.submit(_decode, samples).result()
        except BrokenProcessPool:
            if len(samples) == 1:
                return [(samples[0], "its decoder crashed")]
    middle = len(samples) // 2
    return _decode_alone(open_source, samples[:middle]) + _decode_alone(open_source, samples[middle:])


def _pool(open_source: Callable[[], Source], processes: int) -> ProcessPoolExecutor:
    # Not forked: a copy of a process with threads may wait for ever for a lock that none of its own threads holds.
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (open_source,))


_source: Source | None = None  # of a worker process


def _start(open_source: Callable[[], Source]) -> None:
    global _source
    # Ctrl-C reaches every process of a terminal; the first process ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _source = open_source()


def _open_index(path: str, origin: str) -> IndexedSource:
    return IndexedSource(Index(path), origin)


def _decode(samples: list[int]) -> Bad:
    bad = []
    for sample in samples:
        try:
            _source.decode(sample)
        except (DataError, MemoryError) as error:
            bad.append((sample, without_name(str(error)) or "too little memory"))
    return bad
