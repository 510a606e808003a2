"""This module lists the image files of folders and of text files, each with its class."""

import os
import stat

from ccmim_fast.data.index.index_file import Listing, Row
from ccmim_fast.errors import DataError

BESIDE_CLASSES = "lies beside the class folders, in none of them"
_File = tuple[str, os.stat_result]  # a path, and the status behind any link


def list_folder(root: str, suffixes: tuple[str, ...]) -> Listing:
    """List the images of an ImageFolder tree (sub-folders are classes, images may lie deeper) or of a flat folder.

    Links are followed, and each file and folder counts once, at its first place in the order of the walk. Names that
    begin with a dot are left out, and files without one of the lower-case `suffixes`. Sub-folders without images are
    classes too, so that two splits of one data set agree on the labels. Rows are in byte order, class by class.
    """
    walk = _Walk(root, suffixes)
    # All class folders are known before any of them is read: a link from one to another adds nothing.
    loose, folders = walk.visit(root)
    groups = [walk.images([], [folder], label) for label, folder in enumerate(folders)]
    rest = walk.images(loose, [], -1)
    if not any(groups):
        return Listing(root, rest, (), walk.dependencies, walk.notes)
    loose_paths = (os.path.join(root, os.fsdecode(row.location)) for row in rest)
    walk.notes += [(path, BESIDE_CLASSES) for path in loose_paths]
    names = tuple(map(os.path.basename, folders))
    return Listing(root, [row for group in groups for row in group], names, walk.dependencies, walk.notes)


def read_list(path: str) -> Listing:
    """List the files named in a text file, one a line, relative to its folder; a tab and a class may follow."""
    try:
        with open(path, "rb") as file:
            mtime_ns = os.fstat(file.fileno()).st_mtime_ns
            lines = [os.fsdecode(line) for line in file.read().split(b"\n") if line.strip()]
    except OSError as error:
        raise DataError(f"cannot read the list {path!r}: {error.strerror}") from error
    pairs = [line.rstrip("\r").partition("\t")[::2] for line in lines]
    label_of = {name: label for label, name in enumerate(sorted({name for _, name in pairs if name}))}
    folder = os.path.dirname(os.path.abspath(path))
    rows = [row_of_file(os.path.join(folder, name), folder, label_of.get(group, -1)) for name, group in pairs]
    return Listing(folder, rows, tuple(label_of), {path: mtime_ns}, [])


def row_of_file(path: str, root: str, label: int, status: os.stat_result | None = None) -> Row:
    """Return the row of the file at a path; a file that is missing or not regular gives a bad row."""
    row = Row(os.fsencode(os.path.relpath(path, root)), bytes=0, label=label)
    try:
        status = status or os.stat(path)
    except OSError as error:
        return row.bad(_reason(path, error))
    row = row._replace(bytes=status.st_size, mtime_ns=status.st_mtime_ns)
    return row if stat.S_ISREG(status.st_mode) else row.bad("not a regular file")


def _reason(path: str, error: OSError) -> str:
    return "broken link" if os.path.islink(path) else error.strerror


class _Walk:
    """This class walks through folders and remembers the files and folders that it has met."""

    def __init__(self, root: str, suffixes: tuple[str, ...]):
        self._root, self._suffixes, self._seen = root, suffixes, set()
        self.dependencies: dict[str, int] = {}
        self.notes: list[tuple[str, str]] = []
        self._is_new(os.stat(root))

    def visit(self, folder: str) -> tuple[list[_File], list[str]]:
        """Return the files in a folder and the folders that were not met before, both in byte order of the names."""
        files, folders, names = [], [], []
        try:
            self.dependencies[folder] = os.stat(folder).st_mtime_ns
            names = sorted(os.listdir(folder), key=os.fsencode)
        except OSError as error:
            self.notes.append((folder, error.strerror))
        for path in (os.path.join(folder, name) for name in names if not name.startswith(".")):
            try:
                status = os.stat(path)
            except OSError as error:
                self.notes.append((path, _reason(path, error)))
                continue
            if not stat.S_ISDIR(status.st_mode):
                files.append((path, status))
            elif self._is_new(status):
                folders.append(path)
        return files, folders

    def images(self, files: list[_File], folders: list[str], label: int) -> list[Row]:
        """Return the rows of the images that were not met before, among `files` and below `folders`, in byte order."""
        files, folders = [*files], [*folders]
        while folders:
            found, deeper = self.visit(folders.pop())
            files += found
            folders += deeper
        named = ((path, status) for path, status in files if path.lower().endswith(self._suffixes))
        rows = [row_of_file(path, self._root, label, status) for path, status in named if self._is_new(status)]
        return sorted(rows, key=lambda row: row.location)

    def _is_new(self, status: os.stat_result) -> bool:
        """Tell whether a file or folder is met for the first time, and remember it."""
        identity = status.st_dev, status.st_ino
        new = identity not in self._seen
        self._seen.add(identity)
        return new
