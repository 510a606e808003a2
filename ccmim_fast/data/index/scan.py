"""From what was named (`origin`) to its index: headers are read once, and again where something changed.

Which samples there are is told by `folders`, `tars` and `tables`; here they become rows, in an order that depends on
names alone.
"""

import contextlib
import os
import posixpath
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np

from ccmim_fast.data.index.bad_samples import bad_samples_path, read_bad_samples
from ccmim_fast.data.index.decode import HEADER_BYTES, Header, file_suffixes, needs_more, read_header
from ccmim_fast.data.index.folders import Found
from ccmim_fast.data.index.index_file import BAD, INDEXED, Index, Row, write_index
from ccmim_fast.data.index.origin import Origin, find_origin
from ccmim_fast.data.index.storage import Storage, is_remote, join, open_binary
from ccmim_fast.data.index.tables import open_table
from ccmim_fast.data.index.tars import class_number, read_members
from ccmim_fast.errors import DataError

_THREADS = 8  # hides the latency of a cold or remote disk; parsing itself holds the interpreter lock
_CHUNK = 256  # rows per task: a task each would cost a million futures
_AHEAD = 4  # tasks per thread that wait: rows are made no faster than their headers are read

Report = Callable[[int, int], None]  # rows done, rows of which there are no less than so many


def build_index(
    origin: str, path: str, channels: int = 3, previous: Index | None = None, report: Report = lambda done, known: None
) -> Index:
    """Index what `origin` names, write the index to `path`, and open it.

    Args:
        origin: an ImageFolder tree or flat folder; a folder of tars or of tables; a tar or table, or a pattern of some
            (`*`, `?`, `{000..127}`); a list of files (.txt); a URL of any of these but a list.
        channels: 1 (gray), 3 (RGB), or the C of uint8 [H, W, C] .npy and TIFF files.
        previous: an index of the same; rows that did not change since are taken from it.
        report: called now and then.

    Raises:
        DataError: there is nothing of the kind, or no readable image in it.
    """
    where = find_origin(origin, channels)
    listed = (
        _list_containers(where, channels, previous) if where.found is None else _list_files(where.found, where.root)
    )
    known = _Known(previous if previous is not None and previous.root == where.root else None)
    rows = _with_headers(listed.rows, Storage(where.root, where.containers), channels, known, report)
    index = write_index(
        path,
        rows,
        root=where.root,
        origin=origin,
        channels=channels,
        containers=where.containers,
        class_names=listed.class_names,
        watched=listed.watched,
        notes=listed.notes,
    )
    # Marks are in the index now, or no longer true: a file that was mended has its old place and so its old mark.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(bad_samples_path(path))
    if len(index) == len(index.excluded_X):
        os.unlink(path)
        raise DataError(_nothing_found(origin, channels, index))
    return index


def changed(index: Index) -> bool:
    """Whether files came or went since an index was built.

    Neither a URL is looked at, nor tars that brought their index with them.
    """
    if is_remote(index.root) or index.relocatable:
        return False
    try:
        if index.containers and find_origin(index.origin, index.channels).containers != index.containers:
            return True
        return any(os.stat(path).st_mtime_ns != mtime_ns for path, mtime_ns in index.watched.items())
    except (OSError, DataError):
        return True


class _Listed(NamedTuple):
    """Rows, most without their headers yet, and what `write_index` wants besides."""

    rows: list[Row]
    class_names: tuple[str, ...]
    watched: dict[str, int]
    notes: list[tuple[str, str]]


def _list_files(found: Found, root: str) -> _Listed:
    rows = []
    for file in found.files:
        location = file.path if is_remote(root) else os.path.relpath(file.path, root)
        status, reason = (BAD, file.reason) if file.reason else (INDEXED, None)
        row = Row(
            os.fsencode(location), -1, 0, file.size, file.mtime_ns, label=file.label, status=status, reason=reason
        )
        rows.append(row)
    return _Listed(rows, found.class_names, found.watched, found.notes)


def _list_containers(where: Origin, channels: int, previous: Index | None) -> _Listed:
    """Of the containers that did not change, the rows are taken from the previous index."""
    listed = _Listed([], (), {}, [])
    names: tuple[str, ...] = ()
    own_labels = previous is not None and not _labels_are_folders(previous)
    for number, container in enumerate(where.containers):
        path = join(where.root, container)
        mtime_ns = 0 if is_remote(path) else os.stat(path).st_mtime_ns
        if mtime_ns:
            listed.watched[path] = mtime_ns
            if previous is not None and previous.root == where.root and previous.watched.get(path) == mtime_ns:
                rows = [row._replace(container=number) for row in _rows_in(previous, container)]
                # One without any may have been unreadable; to look again costs little.
                if rows:
                    listed.rows.extend(rows if own_labels else (row._replace(label=-1) for row in rows))
                    listed.notes.extend(note for note in previous.notes if note[0] == path)
                    names = names or (previous.class_names if own_labels else ())
                    continue
        try:
            if path.endswith(".tar"):
                listed.rows.extend(_rows_of_tar(path, number, mtime_ns, channels, listed.notes))
            else:
                rows, said = _rows_of_table(path, number, mtime_ns)
                listed.rows.extend(rows)
                names = names or said
        except (DataError, OSError) as error:
            if is_remote(path):
                # Nobody looks at a URL again: a server's bad moment would be a shard less for ever.
                reason = "not found" if isinstance(error, FileNotFoundError) else error
                raise DataError(f"cannot read {path!r}: {reason}") from error
            listed.notes.append((path, str(error)))
    rows, names = _with_classes(listed.rows, names)
    return listed._replace(rows=rows, class_names=names)


def _rows_of_tar(path: str, number: int, mtime_ns: int, channels: int, notes: list[tuple[str, str]]) -> list[Row]:
    with open_binary(path) as file:
        members, problem = read_members(file, file_suffixes(channels))
    if problem:
        notes.append((path, problem))
    rows = []
    for member in members:
        row = Row(os.fsencode(member.name), number, member.offset, member.size, mtime_ns, label=member.label)
        rows.append(row._replace(status=BAD, reason=member.reason) if member.reason else row)
    return rows


def _rows_of_table(path: str, number: int, mtime_ns: int) -> tuple[list[Row], tuple[str, ...]]:
    with open_binary(path) as file:
        table = open_table(path, file if is_remote(path) else None)
        labels = [class_number(label) for group in range(table.groups) for label in table.labels(group)]
    rows = [Row(b"row %d" % row, number, row, -1, mtime_ns, label=label) for row, label in enumerate(labels)]
    return rows, table.class_names


def _with_classes(rows: list[Row], names: tuple[str, ...]) -> tuple[list[Row], tuple[str, ...]]:
    """Labels that are numbers need names; without any, the first folder of every member's name is its class."""
    highest = max((row.label for row in rows), default=-1)
    if highest >= 0:
        return rows, names if highest < len(names) else tuple(map(str, range(highest + 1)))
    names, labels = _folder_classes(rows)
    return [row._replace(label=label) for row, label in zip(rows, labels, strict=True)], names


def _folder_classes(rows: Iterable[Row]) -> tuple[tuple[str, ...], list[int]]:
    """The first folders of the names, and the label of each row; no classes if an image lies in none."""
    folders = [_first_folder(os.fsdecode(row.location)) for row in rows]
    names = {folder for folder in folders if folder is not None}
    if "" in names:
        return (), [-1] * len(folders)
    label_of = {name: label for label, name in enumerate(sorted(names))}
    return tuple(label_of), [label_of.get(folder, -1) for folder in folders]


def _first_folder(name: str) -> str | None:
    """Of a member; empty without any, None where it leads out of the archive."""
    folder, inside, _ = posixpath.normpath(name).partition("/")
    if name.startswith("/") or folder == "..":
        return None
    return folder if inside else ""


def _labels_are_folders(index: Index) -> bool:
    """Whether an index of containers has its classes from the names of the members."""
    if index.labels_N is None:
        return True
    names, labels = _folder_classes(row for row in index.rows())
    found_N = np.array(labels)
    return names == index.class_names and bool((found_N == index.labels_N)[found_N >= 0].all())


def _rows_in(index: Index, container: str) -> Iterator[Row]:
    marks = read_bad_samples(index)
    for number in np.flatnonzero(index.containers_N == index.containers.index(container)).tolist():
        yield _marked(index.row(number), marks.get(number))


def _marked(row: Row, reason: str | None) -> Row:
    return row if reason is None else row._replace(status=BAD, reason=reason)


class _Known:
    """Rows of a previous index, by where they lie."""

    def __init__(self, index: Index | None):
        self._index, self._marks = index, {} if index is None else read_bad_samples(index)
        self._rows = {row.location: number for number, row in enumerate(index.rows())} if index is not None else {}

    def complete(self, row: Row) -> Row:
        """The row with what its header said when it was last read, if nothing changed since."""
        number = self._rows.get(row.location) if row.container < 0 and row.mtime_ns else None
        if number is None:
            return row
        found = _marked(self._index.row(number), self._marks.get(number))
        if found.mode is None:
            return row  # its header could not be read; perhaps it can now
        same = (found.bytes, found.mtime_ns) == (row.bytes, row.mtime_ns)
        return found._replace(label=row.label) if same else row


def _with_headers(rows: list[Row], storage: Storage, channels: int, known: _Known, report: Report) -> Iterator[Row]:
    """The rows in order, each with what its header says or the reason why it cannot be used."""

    def fill(chunk: list[Row]) -> list[Row]:
        return [_filled(known.complete(row), storage, channels) for row in chunk]

    chunks = (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))
    done = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting = deque(pool.submit(fill, chunk) for chunk in islice(chunks, _THREADS * _AHEAD))
        while waiting:
            filled = waiting.popleft().result()
            waiting.extend(pool.submit(fill, chunk) for chunk in islice(chunks, 1))
            yield from filled
            done += len(filled)
            report(done, len(rows))


def _filled(row: Row, storage: Storage, channels: int) -> Row:
    if row.status == BAD or row.mode is not None:
        return row
    try:
        header, size = _read_header(row, storage, channels)
    except (OSError, DataError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return row._replace(status=BAD, reason=" ".join(reason.split()))
    return row._replace(
        bytes=size,
        size=(header.height, header.width),
        orientation=header.orientation,
        mode=header.mode,
        plain=int(header.plain),
    )


def _read_header(row: Row, storage: Storage, channels: int) -> tuple[Header, int]:
    """The header, and the size in bytes where it is known."""
    where = os.fsdecode(row.location), row.container, row.offset, row.bytes
    start = storage.read(*where, most=HEADER_BYTES)
    if len(start) < HEADER_BYTES or len(start) == row.bytes:
        return read_header(start, channels), len(start)
    if not needs_more(start):
        try:
            return read_header(start, channels), row.bytes
        except DataError:
            pass  # a header longer than this
    data = storage.read(*where)
    return read_header(data, channels), len(data)


def _nothing_found(origin: str, channels: int, index: Index) -> str:
    if not len(index):
        if index.notes:
            path, reason = index.notes[0]
            return f"no image in {origin!r}: {len(index.notes)} skipped, the first {path!r}: {reason}"
        return f"no image in {origin!r}: nothing in it ends in {', '.join(file_suffixes(channels))}"
    return f"no readable image in {origin!r}: {len(index)} skipped, the first {index.location(0)!r}: {index.reason(0)}"
