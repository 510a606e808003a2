"""This module lists the samples of tars and tables, with the classes that they agree on."""

import io
import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ccmim_fast.data.index.bad_samples import read_bad_samples
from ccmim_fast.data.index.endings import is_tar
from ccmim_fast.data.index.index_file import Index, Listing, Row
from ccmim_fast.data.index.left_out import LOST, UNREAD, Note, Notes, merged
from ccmim_fast.data.index.selection import OUTSIDE, folder_labels, outside_training
from ccmim_fast.data.index.storage import Storage, is_remote, join, open_binary, reason_of
from ccmim_fast.data.index.tables import open_table
from ccmim_fast.data.index.tars import label_of, list_tar
from ccmim_fast.errors import DataError, one_line


class _Found(NamedTuple):
    """The samples of one container; a label is an index into `names`, -1: none."""

    rows: list[Row]
    names: tuple[str, ...]
    notes: list[Note]


def list_containers(
    listing: Listing, storage: Storage, channels: int, image_key: str, previous: Index | None
) -> Listing:
    """List the samples of all containers of a listing, in order; those that did not change are as in `previous`.

    A container that cannot be read is noted, and looked at again by the next run. Behind a URL it raises DataError
    instead: nothing tells a later run whether a server has sent all that it has. If any container gives labels, they
    are the classes, by name; else the first folders of the members' names are.
    """
    found, dependencies = [], dict(listing.dependencies)
    for container in listing.containers:
        path, mtime_ns = join(listing.root, container), 0
        try:
            mtime_ns = mtime_ns if is_remote(path) else os.stat(path).st_mtime_ns
            one = _unchanged(previous, container, path, mtime_ns)
            if one is None:
                one = _list_container(path, storage.url(path), channels, image_key)
        except (DataError, OSError) as error:
            if is_remote(path):
                raise DataError(f"cannot read {path!r}: {reason_of(error)}") from error
            one, mtime_ns = _unreadable(path, error), mtime_ns if isinstance(error, DataError) else 0
        if mtime_ns:
            dependencies[path] = mtime_ns
        found.append(one._replace(rows=[row._replace(mtime_ns=mtime_ns) for row in one.rows]))
    if not listing.all_parts:
        found = _training_part(found, [join(listing.root, container) for container in listing.containers])
    labelled = any(row.label >= 0 for one in found for row in one.rows)
    names, rows = _united(found) if labelled else _by_folder(found)
    notes = [*listing.notes, *(note for one in found for note in one.notes)]
    return listing._replace(rows=rows, class_names=names, dependencies=dependencies, notes=notes, labelled=labelled)


def _list_container(path: str, url: str, channels: int, image_key: str) -> _Found:
    """List a tar or a table that is read at `url`."""
    notes = Notes(f"{path}::", path)
    with open_binary(url) as file:
        if is_tar(path):
            rows = list_tar(file, channels, notes, image_key, local=not is_remote(path))
            highest = max((row.label for row in rows), default=-1)
            return _Found(rows, tuple(map(str, range(highest + 1))), list(notes))
        labels, names = _labels_of_table(path, file if is_remote(path) else None)
    rows = [Row(b"row %d" % row, offset=row, label=label) for row, label in enumerate(labels)]
    return _Found(rows, names, list(notes))


def _labels_of_table(path: str, file: io.IOBase | None) -> tuple[list[int], tuple[str, ...]]:
    """Return the label of each row of a table and the names that it gives them; for `file` see `open_table`."""
    table = open_table(path, file)
    labels = [label_of(label) for label in table.labels()]
    highest = max(labels, default=-1)
    # A number beyond the names, or without any, is its own name.
    return labels, (*table.class_names, *map(str, range(len(table.class_names), highest + 1)))


def _training_part(found: list[_Found], paths: list[str]) -> list[_Found]:
    """Return the containers without the samples that all tars together tell to be held out, which are noted."""
    names = [os.fsdecode(row.location) for one, path in zip(found, paths) if is_tar(path) for row in one.rows]
    outside = outside_training(names)
    if not outside:
        return found
    kept = []
    for one, path in zip(found, paths):
        rows, notes = [], Notes(f"{path}::", path)
        for row in one.rows:
            reason = outside.get(os.fsdecode(row.location)) if is_tar(path) else None
            rows += [] if reason else [row]
            if reason:
                notes.add(os.fsdecode(row.location), *reason)
        kept.append(one._replace(rows=rows, notes=merged([*one.notes, *notes])))
    return kept


def _unreadable(path: str, error: Exception) -> _Found:
    if isinstance(error, DataError):
        reason = one_line(str(error).removeprefix(f"{path!r} is "), None)
        return _Found([], (), [Note(reason, LOST, 1, (path,), path)])
    return _Found([], (), [Note(reason_of(error), UNREAD, 1, (path,), path)])


def _unchanged(previous: Index | None, container: str, path: str, mtime_ns: int) -> _Found | None:
    """Return what the previous index has of a container; None if it changed since, or if its own labels are not known.

    The labels of an index are those that its containers agreed on: a table's own ones are read again.
    """
    if previous is None or not mtime_ns or previous.dependencies.get(path) != mtime_ns:
        return None
    notes = [note for note in previous.notes if note.container == path]
    if any(note.kind == UNREAD or note.reason in OUTSIDE for note in notes):  # what is held out may differ now
        return None
    bad = read_bad_samples(previous)
    ids = np.flatnonzero(previous.containers_N == previous.containers.index(container)).tolist()
    rows = [previous.row(index).bad(bad.get(index)) for index in ids]
    if not previous.labelled:
        return _Found([row._replace(label=-1) for row in rows], (), notes)
    if is_tar(path):
        own = {label: previous.class_names[label] for label in {row.label for row in rows} - {-1}}
        if not _numbers(own.values()):  # the names of other containers stand for its numbers
            return None
        names = tuple(map(str, range(max(map(int, own.values()), default=-1) + 1)))
        return _Found([row._replace(label=int(own.get(row.label, -1))) for row in rows], names, notes)
    labels, names = _labels_of_table(path, None)
    return _Found([row._replace(label=label) for row, label in zip(rows, labels)], names, notes)


def _united(found: list[_Found]) -> tuple[tuple[str, ...], list[Row]]:
    """Return the classes of all containers and their rows, with labels by name, not by number.

    Names keep the order of the containers that use them; numbers that stand for themselves are sorted. A container of
    numbers alone means the names of the others, if these agree and have so many.
    """
    used = [{row.label for row in one.rows} - {-1} for one in found]
    named = list(dict.fromkeys(one.names for one, labels in zip(found, used) if labels and not _numbers(one.names)))
    common = named[0] if len(named) == 1 else ()
    lists = [common if common and _numbers(one.names) and len(one.names) <= len(common) else one.names for one in found]
    names = tuple(dict.fromkeys(name for own, labels in zip(lists, used) if labels for name in own))
    if _numbers(names):
        names = tuple(sorted(names, key=int))
    label_of_name = {name: label for label, name in enumerate(names)}
    rows = []
    for number, (one, own) in enumerate(zip(found, lists)):
        new = [label_of_name.get(name, -1) for name in own] + [-1]  # the last one for -1
        rows += (row._replace(container=number, label=new[row.label]) for row in one.rows)
    return names, rows


def _by_folder(found: list[_Found]) -> tuple[tuple[str, ...], list[Row]]:
    rows = [row._replace(container=number) for number, one in enumerate(found) for row in one.rows]
    names, labels = folder_labels([os.fsdecode(row.location) for row in rows])
    return names, [row._replace(label=label) for row, label in zip(rows, labels)]


def _numbers(names: Iterable[str]) -> bool:
    return all(name.isdecimal() for name in names)
