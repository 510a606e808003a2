"""This module builds the index of a place of images (`origin`): it lists the samples, and reads each header once.

Where something changed, headers are read again. The order of the samples depends on names alone.
"""

import contextlib
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ccmim_fast.data.index.bad_samples import bad_samples_path, read_bad_samples
from ccmim_fast.data.index.decode import HEADER_BYTES, HEADER_FIRST, Header, read_header
from ccmim_fast.data.index.endings import file_suffixes
from ccmim_fast.data.index.index_file import BAD, Index, Listing, Row, write_index
from ccmim_fast.data.index.origin import find_origin
from ccmim_fast.data.index.storage import Storage, is_remote, join, open_binary
from ccmim_fast.data.index.tables import open_table
from ccmim_fast.data.index.tars import label_of, list_tar
from ccmim_fast.data.threads import map_ahead
from ccmim_fast.errors import DataError, one_line

_THREADS = 8  # they hide the latency of a cold or remote disk; parsing itself holds the interpreter lock
_ROWS_PER_TASK = 256  # a task for each row would cost a million futures
_AHEAD = 4  # tasks per thread that wait: rows are made no faster than their headers are read


def build_index(
    origin: str, path: str, channels: int, previous: Index | None, report: Callable[[int, int], None]
) -> Index:
    """Index what `origin` names, write the index to `path`, and open it.

    Args:
        origin: an ImageFolder tree or flat folder; a folder of tars or of tables; a tar or table, or a pattern of some
            (`*`, `?`, `{000..127}`); a list of files (.txt); a label file; a URL of a folder, tar or table.
        channels: 1 (gray), 3 (RGB), or the C of uint8 [H, W, C] .npy and TIFF files.
        previous: an index of the same place; rows that did not change since are taken from it.
        report: takes the rows done, and the rows in all.

    Raises DataError if there is no such place, or no readable image in it.
    """
    listing = find_origin(origin, channels)
    root, containers = listing.root, listing.containers
    if previous is not None and previous.root != root:
        previous = None
    if containers:
        listing = _list_containers(root, containers, channels, previous)
    reused = None if containers else previous
    rows = _with_headers(listing.rows, Storage(root, containers), channels, reused, report)
    index = write_index(path, listing._replace(rows=rows), origin, channels)
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


def _list_containers(root: str, containers: list[str], channels: int, previous: Index | None) -> Listing:
    """List the samples of all containers, paths from `root`, in order. A container that cannot be read becomes a note.

    Behind a URL such a container raises DataError instead: no later run looks at a URL again, so that after a server's
    bad moment its samples would be missing for ever.
    """
    rows, dependencies, notes, names = [], {}, [], ()
    # Labels that are no folders of the members' names were given by the containers.
    has_labels = previous is not None and _folder_classes(previous.rows()) != (
        previous.class_names,
        previous.table.column("label").to_pylist(),
    )
    for number, container in enumerate(containers):
        path = join(root, container)
        mtime_ns = 0 if is_remote(path) else os.stat(path).st_mtime_ns
        if mtime_ns:
            dependencies[path] = mtime_ns
        found = _unchanged_rows(previous, container, path, mtime_ns)
        if found:
            notes += (note for note in previous.notes if note[0] == path)
            own_names = previous.class_names if has_labels else ()
            found = found if has_labels else [row._replace(label=-1) for row in found]
        else:
            try:
                found, own_names, problem = _list_container(path, channels)
            except (DataError, OSError) as error:
                if is_remote(path):
                    reason = "not found" if isinstance(error, FileNotFoundError) else error
                    raise DataError(f"cannot read {path!r}: {reason}") from error
                found, own_names, problem = [], (), str(error)
            notes += [(path, problem)] if problem else []
        names = names or own_names
        rows += (row._replace(container=number, mtime_ns=mtime_ns) for row in found)
    highest = max((row.label for row in rows), default=-1)
    if highest < 0:  # no container has labels: the first folder of a member's name is its class
        names, labels = _folder_classes(rows)
        rows = [row._replace(label=label) for row, label in zip(rows, labels, strict=True)]
    elif highest >= len(names):
        names = tuple(map(str, range(highest + 1)))
    return Listing(root, rows, names, dependencies, notes, containers)


def _list_container(path: str, channels: int) -> tuple[list[Row], tuple[str, ...], str]:
    """Return the rows of a tar or table, the class names it gives, and what is wrong with its end."""
    with open_binary(path) as file:
        if path.endswith(".tar"):
            rows, problem = list_tar(file, file_suffixes(channels))
            return rows, (), problem
        table = open_table(path, file if is_remote(path) else None)
        labels = table.labels()
    rows = [Row(b"row %d" % row, offset=row, label=label_of(label)) for row, label in enumerate(labels)]
    return rows, table.class_names, ""


def _unchanged_rows(previous: Index | None, container: str, path: str, mtime_ns: int) -> list[Row]:
    """Return the rows that the previous index has of a container; none if the container changed since."""
    # A container without rows may have been unreadable: it is read again, which costs little.
    if previous is None or not mtime_ns or previous.dependencies.get(path) != mtime_ns:
        return []
    bad = read_bad_samples(previous)
    ids = np.flatnonzero(previous.containers_N == previous.containers.index(container)).tolist()
    return [previous.row(index).bad(bad.get(index)) for index in ids]


def _folder_classes(rows: Iterable[Row]) -> tuple[tuple[str, ...], list[int]]:
    """Return the first folders of the names and the label of each row; no classes if an image lies in no folder."""
    folders = []
    for row in rows:
        name = os.fsdecode(row.location)
        folder, inside, _ = posixpath.normpath(name).partition("/")
        outside = name.startswith("/") or folder == ".."
        folders.append(None if outside else folder if inside else "")
    names = () if "" in folders else tuple(sorted({folder for folder in folders if folder is not None}))
    label_of_folder = {name: label for label, name in enumerate(names)}
    return names, [label_of_folder.get(folder, -1) for folder in folders]


def _with_headers(
    rows: list[Row], storage: Storage, channels: int, previous: Index | None, report: Callable[[int, int], None]
) -> Iterator[Row]:
    """Yield the rows in order, each with its header or why it has none; of unchanged files, as `previous` has them."""
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
        if row.status == BAD or row.mode is not None:
            return row
        try:
            return row.with_header(*_read_header(row, storage, channels))
        except (OSError, DataError) as error:
            return row.bad(one_line(getattr(error, "strerror", None) or error, None))

    parts = (rows[start : start + _ROWS_PER_TASK] for start in range(0, len(rows), _ROWS_PER_TASK))
    done = 0
    for part in map_ahead(lambda part: list(map(filled, part)), parts, _THREADS, _THREADS * _AHEAD):
        yield from part
        done += len(part)
        report(done, len(rows))


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


def _nothing_found(origin: str, channels: int, index: Index) -> str:
    if not len(index) and not index.notes:
        return f"no image in {origin!r}: nothing in it ends in {', '.join(file_suffixes(channels))}"
    path, reason = (index.location(0), index.reason(0)) if len(index) else index.notes[0]
    what, count = ("readable image", len(index)) if len(index) else ("image", len(index.notes))
    return f"no {what} in {origin!r}: {count} skipped, the first {path!r}: {reason}"
