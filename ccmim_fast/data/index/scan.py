"""The way from a place of images (`origin`) to its index: each header is read once, and again where something changed.

`folders`, `containers` and `annotations` list the samples; their order depends on names alone.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

from ccmim_fast.data.index.bad_samples import bad_samples_path, read_bad_samples
from ccmim_fast.data.index.containers import list_containers
from ccmim_fast.data.index.decode import HEADER_BYTES, Header, file_suffixes, needs_more, read_header
from ccmim_fast.data.index.index_file import BAD, Index, Row, write_index
from ccmim_fast.data.index.origin import find_origin
from ccmim_fast.data.index.storage import Storage, is_remote
from ccmim_fast.data.threads import map_ahead
from ccmim_fast.errors import DataError

_THREADS = 8  # they hide the latency of a cold or remote disk; parsing itself holds the interpreter lock
_ROWS_PER_TASK = 256  # a task for each row would cost a million futures
_AHEAD = 4  # tasks per thread that wait: rows are made no faster than their headers are read

Report = Callable[[int, int], None]  # rows done, rows in all


def build_index(
    origin: str, path: str, channels: int = 3, previous: Index | None = None, report: Report = lambda done, total: None
) -> Index:
    """Index what `origin` names, write the index to `path`, and open it.

    Args:
        origin: an ImageFolder tree or flat folder; a folder of tars or of tables; a tar or table, or a pattern of some
            (`*`, `?`, `{000..127}`); a list of files (.txt); a label file; a URL of a folder, tar or table.
        channels: 1 (gray), 3 (RGB), or the C of uint8 [H, W, C] .npy and TIFF files.
        previous: an index of the same place; rows that did not change since are taken from it.

    Raises DataError if there is no such place, or no readable image in it.
    """
    root, containers, files = find_origin(origin, channels)
    if previous is not None and previous.root != root:
        previous = None
    listing = list_containers(root, containers, channels, previous) if files is None else files
    reuse = _reuse(previous if files is not None else None)
    rows = _with_headers(listing.rows, Storage(root, containers), channels, reuse, report)
    listing = listing._replace(rows=rows)
    index = write_index(path, listing, root=root, origin=origin, channels=channels, containers=containers)
    # The records of bad samples are in the index now, or no longer true: a repaired file has its old id.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(bad_samples_path(path))
    if len(index) == len(index.excluded_X):
        os.unlink(path)
        raise DataError(_nothing_found(origin, channels, index))
    return index


def changed(index: Index) -> bool:
    """Tell whether files came or went since an index was built; URLs and shards with their index do not change."""
    if is_remote(index.root) or index.relocatable:
        return False
    try:
        if index.containers and find_origin(index.origin, index.channels).containers != index.containers:
            return True
        return any(os.stat(path).st_mtime_ns != mtime_ns for path, mtime_ns in index.dependencies.items())
    except (OSError, DataError):
        return True


def _reuse(previous: Index | None) -> Callable[[Row], Row]:
    """Return a function that takes a file's row from the previous index if the file did not change since."""
    if previous is None:
        return lambda row: row
    bad = read_bad_samples(previous)
    ids = {row.location: index for index, row in enumerate(previous.rows())}

    def reuse(row: Row) -> Row:
        index = ids.get(row.location) if row.mtime_ns else None
        if index is None:
            return row
        found = previous.row(index).bad(bad.get(index))
        # Without a mode the header could not be read then; perhaps it can be read now.
        same = found.mode is not None and (found.bytes, found.mtime_ns) == (row.bytes, row.mtime_ns)
        return found._replace(label=row.label) if same else row

    return reuse


def _with_headers(
    rows: list[Row], storage: Storage, channels: int, reuse: Callable[[Row], Row], report: Report
) -> Iterator[Row]:
    """Yield the rows in order, each with what its header says or the reason why it cannot be used."""

    def fill(part: list[Row]) -> list[Row]:
        return [_filled(reuse(row), storage, channels) for row in part]

    parts = (rows[start : start + _ROWS_PER_TASK] for start in range(0, len(rows), _ROWS_PER_TASK))
    done = 0
    for filled in map_ahead(fill, parts, _THREADS, _THREADS * _AHEAD):
        yield from filled
        done += len(filled)
        report(done, len(rows))


def _filled(row: Row, storage: Storage, channels: int) -> Row:
    if row.status == BAD or row.mode is not None:
        return row
    try:
        return row.with_header(*_read_header(row, storage, channels))
    except (OSError, DataError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return row.bad(" ".join(reason.split()))


def _read_header(row: Row, storage: Storage, channels: int) -> tuple[Header, int]:
    """Return the header, and the length in bytes where it is known."""
    place = os.fsdecode(row.location), row.container, row.offset, row.bytes
    start = storage.read(*place, most=HEADER_BYTES)
    if len(start) < HEADER_BYTES or len(start) == row.bytes:
        return read_header(start, channels), len(start)
    if not needs_more(start):
        try:
            return read_header(start, channels), row.bytes
        except DataError:
            pass  # the header is longer
    data = storage.read(*place)
    return read_header(data, channels), len(data)


def _nothing_found(origin: str, channels: int, index: Index) -> str:
    if len(index):
        first = f"{index.location(0)!r}: {index.reason(0)}"
        return f"no readable image in {origin!r}: {len(index)} skipped, the first {first}"
    if index.notes:
        path, reason = index.notes[0]
        return f"no image in {origin!r}: {len(index.notes)} skipped, the first {path!r}: {reason}"
    return f"no image in {origin!r}: nothing in it ends in {', '.join(file_suffixes(channels))}"
