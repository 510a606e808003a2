"""This module builds the index of a place of images (`origin`): it lists the samples, and reads each header once.

Where something changed, headers are read again. The order of the samples depends on names alone.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from ccmim_fast.data.index.bad_samples import bad_samples_path, read_bad_samples
from ccmim_fast.data.index.containers import list_containers
from ccmim_fast.data.index.decode import HEADER_BYTES, HEADER_FIRST, Header, read_header
from ccmim_fast.data.index.endings import file_suffixes
from ccmim_fast.data.index.index_file import UNSEEN, UNUSABLE, Index, Listing, Row, metadata_of, table_of, write_table
from ccmim_fast.data.index.left_out import OTHER, UNREAD, merged
from ccmim_fast.data.index.origin import find_origin
from ccmim_fast.data.index.own import open_regular
from ccmim_fast.data.index.storage import Storage, is_remote, reason_of
from ccmim_fast.data.threads import map_ahead
from ccmim_fast.errors import DataError
from ccmim_fast.secrets import without_secrets

_THREADS = 8  # they hide the latency of a cold or remote disk; parsing itself holds the interpreter lock
_ROWS_PER_TASK = 256  # a task for each row would cost a million futures
_AHEAD = 4  # tasks per thread that wait: rows are made no faster than their headers are read
_TRIED = 32  # samples in a row that a server does not give until it counts as gone: two minutes of silence on 8 threads


def build_index(
    origin: str,
    path: str,
    channels: int,
    previous: Index | None,
    report: Callable[[int, int], None],
    image_key: str = "",
) -> Index:
    """Index what `origin` names, write the index to `path`, and open it.

    Args:
        origin: an ImageFolder tree or flat folder; a folder of tars or of tables; a tar or table, or a pattern of some
            (`*`, `?`, `{000..127}`); a list of files, or of tars and tables (.txt); a label file; a URL of a folder,
            tar or table.
        channels: 1 (gray), 3 (RGB), or the C of uint8 [H, W, C] .npy and TIFF files.
        previous: an index of the same place; rows that did not change since are taken from it.
        report: takes the rows done, and the rows in all.
        image_key: which member of a sample is its image, see `selection.samples`.

    Passwords and queries of a URL are not written. Raises DataError if there is no such place, or no readable image in
    it; the file at `path` is then as it was.
    """
    listing = find_origin(origin, channels, image_key)
    storage = Storage(listing.root, listing.containers, origin)
    if previous is not None and previous.root != listing.root:
        previous = None
    if listing.containers:
        listing = list_containers(listing, storage, channels, image_key, previous)
    reused = None if listing.containers else previous
    table = table_of(_with_headers(listing.rows, storage, channels, reused, report))
    if not (table.column("status").to_numpy() < UNUSABLE).any():
        first = zip(*(table.column(name).slice(0, 1).to_pylist() for name in ("location", "reason")))
        raise DataError(_nothing_found(without_secrets(origin), channels, listing, len(table), *first))
    return _written(path, table, metadata_of(listing, without_secrets(origin), channels, image_key))


def changed(index: Index) -> bool:
    """Tell whether files came or went since an index was built; URLs and shards with their index do not change.

    A place that could not be read then and can be read now is a change, too.
    """
    if is_remote(index.root) or index.relocatable:
        return False
    unread = [path for note in index.notes if note.kind == UNREAD for path in note.paths]
    try:
        if any(map(_can_be_read, unread)):
            return True
        if index.containers and not os.path.isdir(index.origin):
            found = find_origin(index.origin, index.channels, index.image_key)
            if found.containers != index.containers:
                return True
        return any(os.stat(path).st_mtime_ns != mtime_ns for path, mtime_ns in index.dependencies.items())
    except (OSError, DataError):
        return True


def look_again(index: Index, origin: str) -> Index:
    """Read the headers that could not be read when an index was built; if some can be now, write and open it anew.

    The rest of the index is not looked at: it is a file's right or a server's bad moment that may have passed.
    """
    unseen = np.flatnonzero(index.status_N == UNSEEN).tolist()
    rows, storage = {}, Storage(index.root, index.containers, origin)
    for start in range(0, len(unseen), _TRIED):
        part = unseen[start : start + _TRIED]
        tried = map_ahead(lambda sample: _filled(index.row(sample), storage, index.channels), part, _THREADS, _TRIED)
        seen = {sample: row for sample, row in zip(part, tried) if row.status != UNSEEN}
        rows |= seen
        if not seen:
            break
    if not rows:
        return index
    bad = read_bad_samples(index)
    every = (rows.get(sample, row).bad(bad.get(sample)) for sample, row in enumerate(index.rows()))
    return _written(index.path, table_of(every), index.metadata)


def _written(path: str, table: pa.Table, metadata: dict[str, Any]) -> Index:
    index = write_table(path, table, metadata)
    # The records of bad samples are in the index now, or no longer true: a repaired file has its old id.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(bad_samples_path(path))
    return index


def _can_be_read(path: str) -> bool:
    """Tell whether a folder can be listed, or a file opened."""
    try:
        if os.path.isdir(path):
            os.listdir(path)
        else:
            os.close(open_regular(path))
    except OSError:
        return False
    return True


def _with_headers(
    rows: list[Row], storage: Storage, channels: int, previous: Index | None, report: Callable[[int, int], None]
) -> Iterator[Row]:
    """Yield the rows in order, each with its header or why it has none; of unchanged files, as `previous` has them.

    Raises DataError if a server gives none of many samples in a row.
    """
    bad, ids = {}, {}
    if previous is not None:
        bad = read_bad_samples(previous)
        ids = {row.location: index for index, row in enumerate(previous.rows())}

    def filled(row: Row) -> Row:
        index = ids.get(row.location) if row.mtime_ns else None
        if index is not None:
            found = previous.row(index).bad(bad.get(index))
            # Without a mode the header could not be read then; perhaps it can be read now.
            if found.mode is not None and (found.bytes, found.mtime_ns) == (row.bytes, row.mtime_ns):
                return found._replace(label=row.label)
        return _filled(row, storage, channels)

    size = 1 if storage.remote else _ROWS_PER_TASK  # a request costs more than a future, and may cost half a minute
    parts = (rows[start : start + size] for start in range(0, len(rows), size))
    done, silent = 0, 0
    for part in map_ahead(lambda part: list(map(filled, part)), parts, _THREADS, _THREADS * _AHEAD):
        for row in part if storage.remote else []:
            silent = silent + 1 if row.status == UNSEEN else 0
            if silent >= _TRIED:
                raise DataError(f"{storage.path('', -1)!r}: {silent} images in a row cannot be read: {row.reason}")
        yield from part
        done += len(part)
        report(done, len(rows))


def _filled(row: Row, storage: Storage, channels: int) -> Row:
    """Return a row with its header, or with the reason why it has none."""
    if row.status not in (UNSEEN, 0) or row.mode is not None:
        return row
    try:
        return row.with_header(*_read_header(row, storage, channels))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError) or (error.errno is None and not storage.remote)
        return row.bad(reason_of(error), *(() if missing else (UNSEEN,)))
    except DataError as error:
        return row.bad(reason_of(error))


def _read_header(row: Row, storage: Storage, channels: int) -> tuple[Header, int]:
    """Return the header, and the length in bytes where it is known."""
    place = os.fsdecode(row.location), row.container, row.offset, row.bytes
    start = storage.read(*place, most=HEADER_BYTES)
    if len(start) < HEADER_BYTES or len(start) == row.bytes:
        return read_header(start, channels), len(start)
    if start.startswith(HEADER_FIRST):
        try:
            return read_header(start, channels), row.bytes
        except DataError:
            pass  # the header is longer
    data = storage.read(*place)
    return read_header(data, channels), len(data)


def _nothing_found(origin: str, channels: int, listing: Listing, rows: int, *first: tuple[bytes, str]) -> str:
    """Return the line for a place without any usable image."""
    if rows:
        location, reason = first[0]
        return f"no readable image in {origin!r}: {rows} skipped, the first {os.fsdecode(location)!r}: {reason}"
    notes = [note for note in merged(listing.notes) if note.kind != OTHER]
    told = f"{notes[0].count} skipped, the first {notes[0].paths[0]!r}: {notes[0].reason}" if notes else ""
    nothing = "" if listing.containers else f"nothing in it ends in {', '.join(file_suffixes(channels))}"
    return f"no image in {origin!r}: {'; '.join(filter(None, [nothing, told])) or 'no rows, no members'}"
