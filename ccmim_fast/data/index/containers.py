"""The samples of tars and tables; those of a container that did not change come from the previous index."""

import os
import posixpath
from collections.abc import Iterable

import numpy as np

from ccmim_fast.data.index.bad_samples import read_bad_samples
from ccmim_fast.data.index.decode import file_suffixes
from ccmim_fast.data.index.index_file import Index, Listing, Row
from ccmim_fast.data.index.storage import is_remote, join, open_binary
from ccmim_fast.data.index.tables import open_table
from ccmim_fast.data.index.tars import label_of, list_tar
from ccmim_fast.errors import DataError


def list_containers(root: str, containers: list[str], channels: int, previous: Index | None) -> Listing:
    """List the samples of all containers, in order. A container that cannot be read becomes a note.

    Behind a URL such a container raises DataError instead: no later run looks at a URL again, so that after a server's
    bad moment its samples would be missing for ever.

    Args:
        root: folder or URL; `containers` are paths from it.
        previous: an index with the same root, or None.
    """
    rows, dependencies, notes, names = [], {}, [], ()
    has_labels = previous is not None and not _labels_are_folders(previous)
    for number, container in enumerate(containers):
        path = join(root, container)
        mtime_ns = 0 if is_remote(path) else os.stat(path).st_mtime_ns
        if mtime_ns:
            dependencies[path] = mtime_ns
        found = _unchanged_rows(previous, container, path, mtime_ns)
        if found:
            notes += (note for note in previous.notes if note[0] == path)
            if has_labels:
                names = names or previous.class_names
            else:
                found = [row._replace(label=-1) for row in found]
        else:
            try:
                found, own_names, problem = _list_container(path, channels)
                names = names or own_names
            except (DataError, OSError) as error:
                if is_remote(path):
                    reason = "not found" if isinstance(error, FileNotFoundError) else error
                    raise DataError(f"cannot read {path!r}: {reason}") from error
                found, problem = [], str(error)
            if problem:
                notes.append((path, problem))
        rows += (row._replace(container=number, mtime_ns=mtime_ns) for row in found)
    rows, names = _with_classes(rows, names)
    return Listing(rows, names, dependencies, notes)


def _list_container(path: str, channels: int) -> tuple[list[Row], tuple[str, ...], str]:
    """Return the rows of a tar or table, the class names it gives, and what is wrong with its end."""
    with open_binary(path) as file:
        if path.endswith(".tar"):
            rows, problem = list_tar(file, file_suffixes(channels))
            return rows, (), problem
        table = open_table(path, file if is_remote(path) else None)
        labels = [label_of(label) for group in range(table.groups) for label in table.labels(group)]
    rows = [Row(b"row %d" % row, offset=row, label=label) for row, label in enumerate(labels)]
    return rows, table.class_names, ""


def _unchanged_rows(previous: Index | None, container: str, path: str, mtime_ns: int) -> list[Row]:
    """Return the rows that the previous index has of a container, if the container did not change since.

    A container without rows may have been unreadable: it is read again, which costs little.
    """
    if previous is None or not mtime_ns or previous.dependencies.get(path) != mtime_ns:
        return []
    bad = read_bad_samples(previous)
    ids = np.flatnonzero(previous.containers_N == previous.containers.index(container)).tolist()
    return [previous.row(index).bad(bad.get(index)) for index in ids]


def _with_classes(rows: list[Row], names: tuple[str, ...]) -> tuple[list[Row], tuple[str, ...]]:
    """Name the classes of numeric labels; without any label, the first folder of a member's name is its class."""
    highest = max((row.label for row in rows), default=-1)
    if highest >= 0:
        return rows, names if highest < len(names) else tuple(map(str, range(highest + 1)))
    names, labels = _folder_classes(rows)
    return [row._replace(label=label) for row, label in zip(rows, labels, strict=True)], names


def _folder_classes(rows: Iterable[Row]) -> tuple[tuple[str, ...], list[int]]:
    """Return the first folders of the names and the label of each row; no classes if an image lies in no folder."""
    folders = [_first_folder(os.fsdecode(row.location)) for row in rows]
    names = {folder for folder in folders if folder is not None}
    if "" in names:
        return (), [-1] * len(folders)
    label_of_folder = {name: label for label, name in enumerate(sorted(names))}
    return tuple(label_of_folder), [label_of_folder.get(folder, -1) for folder in folders]


def _first_folder(name: str) -> str | None:
    """Return the first folder of a member's name; empty without any, None if it leads out of the archive."""
    folder, inside, _ = posixpath.normpath(name).partition("/")
    if name.startswith("/") or folder == "..":
        return None
    return folder if inside else ""


def _labels_are_folders(index: Index) -> bool:
    """Tell whether an index of containers has its classes from the names of the members."""
    if index.labels_N is None:
        return True
    names, labels = _folder_classes(index.rows())
    found_N = np.array(labels)
    return names == index.class_names and bool((found_N == index.labels_N)[found_N >= 0].all())
