"""Image files in folders and lists: which there are, and which class each belongs to."""

import os
import stat
from collections.abc import Iterable
from typing import NamedTuple

from ccmim_fast.errors import DataError

Note = tuple[str, str]  # path, reason


class File(NamedTuple):
    """path: as it is opened; any bytes of a name survive. label: index of its class, -1 without one. reason: why it is
    no image; empty if it may be one."""

    path: str
    size: int
    mtime_ns: int
    label: int = -1
    reason: str = ""


class Found(NamedTuple):
    """What a walk met.

    Attributes:
        files: in byte order of their paths, class by class.
        class_names: sorted; empty without classes.
        watched: folder or list -> its mtime_ns, which changes when files come or go.
        notes: what could not be looked at.
    """

    files: list[File]
    class_names: tuple[str, ...]
    watched: dict[str, int]
    notes: list[Note]


def walk_folder(root: str, suffixes: tuple[str, ...]) -> Found:
    """The images of an ImageFolder tree (sub-folders are classes, images may lie deeper) or of a flat folder.

    Links are followed, and each file and folder counts once, at its first place in the order of the walk. Names that
    begin with a dot are not looked at. Sub-folders without images are classes too, so that two splits of one data set
    agree on the labels.

    Args:
        suffixes: lower-case endings of the files that count.
    """
    walk = _Walk(root, suffixes)
    folders, loose = [], []
    for path, status in walk.entries(root):
        if not stat.S_ISDIR(status.st_mode):
            loose.append((path, status))
        elif walk.enter(status):
            # All class folders are known before any is entered: a link from one to another adds nothing.
            folders.append(path)
    groups = [walk.below(folder, label) for label, folder in enumerate(folders)]
    rest = walk.images(loose, -1)
    if any(groups):
        walk.notes += [(file.path, "lies beside the class folders, in none of them") for file in rest]
        names = tuple(os.path.basename(folder) for folder in folders)
        return Found([file for group in groups for file in group], names, walk.watched, walk.notes)
    return Found(rest, (), walk.watched, walk.notes)


def read_list(path: str) -> Found:
    """The files named in a text file, a line each, relative to its folder; after a tab a class may stand.

    Raises:
        DataError: the list cannot be read.
    """
    try:
        with open(path, "rb") as file:
            mtime_ns = os.fstat(file.fileno()).st_mtime_ns
            lines = [os.fsdecode(line) for line in file.read().split(b"\n") if line.strip()]
    except OSError as error:
        raise DataError(f"cannot read the list {path!r}: {error.strerror}") from error
    pairs = [line.rstrip("\r").partition("\t")[::2] for line in lines]
    names = tuple(sorted({name for _, name in pairs if name}))
    label_of = {name: label for label, name in enumerate(names)}
    folder = os.path.dirname(os.path.abspath(path))
    files = [file_at(os.path.join(folder, name), label_of.get(group, -1)) for name, group in pairs]
    return Found(files, names, {path: mtime_ns}, [])


def file_at(path: str, label: int) -> File:
    """What is at a path; nothing there, or nothing to be read, is the reason why it is no image."""
    try:
        status = os.stat(path)
    except OSError as error:
        return File(path, 0, 0, label, "broken link" if os.path.islink(path) else error.strerror)
    return _file(path, status, label)


def _file(path: str, status: os.stat_result, label: int) -> File:
    reason = "" if stat.S_ISREG(status.st_mode) else "not a regular file"
    return File(path, status.st_size, status.st_mtime_ns, label, reason)


class _Walk:
    """Where a walk has been."""

    def __init__(self, root: str, suffixes: tuple[str, ...]):
        self._suffixes = suffixes
        self.watched: dict[str, int] = {}
        self.notes: list[Note] = []
        self._seen = set()
        self.enter(os.stat(root))

    def enter(self, status: os.stat_result) -> bool:
        """Whether this file or folder is met for the first time."""
        identity = status.st_dev, status.st_ino
        new = identity not in self._seen
        self._seen.add(identity)
        return new

    def below(self, folder: str, label: int) -> list[File]:
        """The images in a folder and below, in byte order."""
        found, waiting = [], [folder]
        while waiting:
            files = []
            for path, status in self.entries(waiting.pop()):
                if not stat.S_ISDIR(status.st_mode):
                    files.append((path, status))
                elif self.enter(status):
                    waiting.append(path)
            found += self.images(files, label)
        return sorted(found, key=lambda file: os.fsencode(file.path))

    def images(self, entries: Iterable[tuple[str, os.stat_result]], label: int) -> list[File]:
        """Those with an image's suffix that were not met before."""
        named = ((path, status) for path, status in entries if path.lower().endswith(self._suffixes))
        return [_file(path, status, label) for path, status in named if self.enter(status)]

    def entries(self, folder: str) -> list[tuple[str, os.stat_result]]:
        """(path, status behind any link) of what lies in a folder, in byte order of the names."""
        entries = []
        try:
            self.watched[folder] = os.stat(folder).st_mtime_ns
            names = sorted(os.listdir(folder), key=os.fsencode)
        except OSError as error:
            self.notes.append((folder, error.strerror))
            return entries
        for path in (os.path.join(folder, name) for name in names if not name.startswith(".")):
            try:
                entries.append((path, os.stat(path)))
            except OSError as error:
                self.notes.append((path, "broken link" if os.path.islink(path) else error.strerror))
        return entries
