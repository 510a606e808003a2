"""This module lists the image files of folders, each with its class."""

import errno
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from ccmim_fast.data.index.endings import CONTAINERS, SNIFFED, begins_like_an_image
from ccmim_fast.data.index.index_file import UNSEEN, Listing, Row
from ccmim_fast.data.index.left_out import LOST, MEANT, UNREAD, Notes
from ccmim_fast.data.index.own import BESIDE, is_marked, open_regular, output_of, outputs_among
from ccmim_fast.data.index.selection import folder_labels, select
from ccmim_fast.errors import DataError


class _File(NamedTuple):
    """A file below the root, behind any link."""

    size: int
    mtime_ns: int
    identity: int  # the same for two names of one file
    regular: bool


def list_folder(root: str, channels: int, image_key: str = "") -> Listing:
    """List what a folder holds at any depth: images, whose classes are the sub-folders, or else tars and tables.

    Links are followed, and each file and folder counts once, at its first place in the order of the rows. What is left
    out, and why, is in the notes. Sub-folders without images are classes too, so that two splits of one data set agree
    on the labels. Rows are in byte order, class by class; images that lie in no sub-folder come last, without a class.
    Raises DataError if the folder itself cannot be read.
    """
    walk = _Walk(root)
    images, containers = select([*walk.files], channels, image_key, walk.notes, walk.is_image)
    if containers:
        return Listing(root, [], (), walk.dependencies, list(walk.notes), walk.once(containers))
    classes, labels = folder_labels(images, walk.folders)
    label_of = dict(zip(images, labels))
    last = len(classes)
    images.sort(key=lambda name: (label_of[name] % (last + 1), os.fsencode(name)))  # -1 comes last
    rows = [walk.row(name, label_of[name]) for name in walk.once(images)]
    return Listing(root, rows, classes, walk.dependencies, list(walk.notes))


def row_of_file(path: str, root: str, label: int) -> Row:
    """Return the row of the file at a path; a file that is missing or not regular gives a bad row."""
    row = Row(os.fsencode(os.path.relpath(path, root)), bytes=0, label=label)
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason, unread = _why(path, error) if isinstance(error, OSError) else ("a name with a zero byte", False)
        return row._replace(bytes=-1).bad(reason, UNSEEN) if unread else row.bad(reason)
    row = row._replace(bytes=status.st_size, mtime_ns=status.st_mtime_ns)
    if stat.S_ISDIR(status.st_mode):
        return row.bad("a folder, not an image")
    return row if stat.S_ISREG(status.st_mode) else row.bad("not a regular file")


def _why(path: str, error: OSError) -> tuple[str, bool]:
    """Return the reason of an error, and whether it is one of the moment, such as a missing right."""
    lasting = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
    if lasting and os.path.islink(path):
        return ("links in a loop" if error.errno == errno.ELOOP else "broken link"), False
    return error.strerror, not lasting


class _Walk:
    """This class holds the visible files and folders below a root, by their names from it."""

    def __init__(self, root: str):
        self._prefix, self._seen = os.path.join(root, ""), set()
        self.dependencies: dict[str, int] = {}
        self.notes = Notes(self._prefix)
        self.files: dict[str, _File] = {}
        self.folders: list[str] = []
        try:
            self._is_new(_identity(os.stat(root)))
            own = output_of(root, {*os.listdir(root)} - {BESIDE})
        except OSError as error:
            raise DataError(f"cannot look into {root!r}: {error.strerror}") from error
        if own:
            raise DataError(f"{root!r} is {own}; set data.root to a folder of images")
        waiting = [""]
        while waiting:
            waiting += reversed([*self._visit(waiting.pop())])

    def _visit(self, folder: str) -> Iterator[str]:
        """Take over the files of a folder, and yield the folders in it that were not met before, in byte order."""
        place = self._prefix + folder
        try:
            self.dependencies[place] = os.stat(place).st_mtime_ns
            names = sorted(os.listdir(place), key=os.fsencode)
        except OSError as error:
            self.notes.add(folder, error.strerror, UNREAD)
            return
        own = output_of(place, {*names}) if folder else ""
        if own:
            self.notes.add(folder, own, MEANT)
            self.folders = [name for name in self.folders if not f"{folder}/".startswith(f"{name}/")]
            return
        if folder:
            self.folders.append(folder)
        for name in outputs_among(place, names):
            self.notes.add(f"{folder}/{name}" if folder else name, "an output of this program", MEANT)
            names.remove(name)
        for name in names:
            inside = f"{folder}/{name}" if folder else name
            if self._take(inside, hidden=name.startswith(".")):
                yield inside

    def _take(self, name: str, hidden: bool) -> bool:
        """Take over a file; tells if it is a new folder instead."""
        path = self._prefix + name
        try:
            status = os.stat(path)
        except OSError as error:
            if not hidden:
                reason, unread = _why(path, error)
                self.notes.add(name, reason, UNREAD if unread else LOST)
            return False
        if stat.S_ISDIR(status.st_mode):
            return not hidden and self._is_new(_identity(status))
        regular, container = stat.S_ISREG(status.st_mode), name.lower().endswith(CONTAINERS)
        if container and not regular:
            self.notes.add(name, "not a regular file")
        elif container and is_marked(path):
            self.notes.add(name, "an output of this program", MEANT)
        else:
            self.files[name] = _File(status.st_size, status.st_mtime_ns, _identity(status), regular)
        return False

    def _is_new(self, identity: int) -> bool:
        """Tell whether a file or folder is met for the first time, and remember it."""
        new = identity not in self._seen
        self._seen.add(identity)
        return new

    def once(self, names: list[str]) -> list[str]:
        """Return the names without those of files that came before under another name."""
        return [name for name in names if self._is_new(self.files[name].identity)]

    def row(self, name: str, label: int) -> Row:
        file = self.files[name]
        row = Row(os.fsencode(name), bytes=file.size, mtime_ns=file.mtime_ns, label=label)
        return row if file.regular else row.bad("not a regular file")

    def is_image(self, name: str) -> bool:
        """Tell whether the content of a file is an image's by its first bytes."""
        try:
            with open(self._prefix + name, "rb", buffering=0, opener=open_regular) as file:
                return begins_like_an_image(file.read(SNIFFED))
        except OSError:
            return False


def _identity(status: os.stat_result) -> int:
    return status.st_dev << 64 | status.st_ino
