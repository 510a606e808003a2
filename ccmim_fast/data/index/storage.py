"""Bytes from where they lie: files, spans of tars and rows of tables, on a disk or behind any fsspec URL."""

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from ccmim_fast.data.index.tables import Table, open_table
from ccmim_fast.errors import CcmimError, DataError, MachineError

_OPEN = 256  # containers kept open; a process may usually have 1,024 files
_ROW_GROUPS = 8  # of tables kept in memory: some 10 MB each


def is_remote(path: str) -> bool:
    """Whether `path` is a URL."""
    return "://" in path


def join(root: str, path: str) -> str:
    """`path` from `root`; both of a disk, or of a URL."""
    if not path or is_remote(path):
        return path or root
    return f"{root.rstrip('/')}/{path}" if is_remote(root) else os.path.join(root, path)


def file_system(url: str) -> Any:
    """fsspec's file system of a URL.

    Raises:
        MachineError: what its protocol needs is not installed.
        DataError: no such protocol.
    """
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)[0]
    except ImportError as error:
        raise MachineError(f"{url!r} cannot be read: {error}; pip install 'ccmim_fast[remote]'") from error
    except ValueError as error:
        raise DataError(f"{url!r} cannot be read: {error}") from error


@contextmanager
def as_os_errors(path: str) -> Iterator[None]:
    """What fsspec's file systems raise besides, as the errors of their HTTP clients, is an OSError outside."""
    try:
        yield
    except (OSError, CcmimError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


@contextmanager
def open_binary(path: str) -> Iterator[io.IOBase]:
    """A file of a disk or a URL, to read from any place of it. Raises OSError, in the block too."""
    with as_os_errors(path), file_system(path).open(path, "rb") if is_remote(path) else open(path, "rb") as file:
        yield file


class Storage:
    """What lies below `root`. May be used by many threads, and by a copy of this process.

    Args:
        root: folder or URL.
        containers: paths from `root` of tars or tables.
    """

    def __init__(self, root: str, containers: list[str]):
        self._root, self._containers = root, containers
        self._remote = file_system(root) if is_remote(root) else None
        self._opened: Callable = lru_cache(_OPEN)(self._open)
        self._tables: Callable = lru_cache(_OPEN)(self._open_table)
        self._groups = _Kept(_ROW_GROUPS)

    def path(self, location: str, container: int) -> str:
        """For messages: the file, or container::member."""
        if container < 0:
            return join(self._root, location)
        return f"{join(self._root, self._containers[container])}::{location}"

    def read(self, location: str, container: int, offset: int, size: int, most: int | None = None) -> bytes:
        """All bytes of a sample, or its first ones.

        Args:
            location, container, offset: see `index.SCHEMA`.
            size: how many bytes it has; -1: not known.
            most: read so many, at least, if it has as many.

        Raises:
            OSError: as the disk or the other side says.
            DataError: the sample has not `size` bytes.
        """
        if container < 0:
            data = self._read_file(join(self._root, location), most)
        elif self._containers[container].endswith(".tar"):
            data = self._read_span(container, offset, size if most is None else min(size, most))
        else:
            data = self._read_row(container, offset)
        if most is None and 0 <= size != len(data):
            raise DataError(f"has {len(data)} bytes, and {size} when it was indexed")
        return data

    def _read_file(self, path: str, most: int | None) -> bytes:
        if self._remote is not None:
            with as_os_errors(path):
                return self._remote.cat_file(path, 0, most) if most else self._remote.cat_file(path)
        with open(path, "rb", buffering=0) as file:
            return file.read(most) if most else file.readall()

    def _read_span(self, container: int, offset: int, size: int) -> bytes:
        if self._remote is not None:
            path = join(self._root, self._containers[container])
            with as_os_errors(path):
                data = self._remote.cat_file(path, offset, offset + size)
            if len(data) > size:
                raise OSError("the server sends whole files, not ranges of them")
            return data
        file = self._opened(container)  # held by a name: were it dropped meanwhile, its number could be another file's
        return os.pread(file.fileno(), size, offset)

    def _read_row(self, container: int, row: int) -> bytes:
        path = join(self._root, self._containers[container])
        with as_os_errors(path):
            table = self._tables(container)
            group, inside = table.find(row)
            return self._groups.get((container, group), lambda: table.images(group))[inside].as_py() or b""

    def _open(self, container: int) -> io.FileIO:
        # A file that is dropped from the cache is closed when its last reader has done.
        return open(join(self._root, self._containers[container]), "rb", buffering=0)

    def _open_table(self, container: int) -> Table:
        path = join(self._root, self._containers[container])
        return open_table(path, self._remote.open(path, "rb") if self._remote is not None else None)


class _Kept:
    """The last few results of something slow; threads that want the same one wait for the first."""

    def __init__(self, most: int):
        self._most, self._lock, self._found = most, threading.Lock(), OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        with self._lock:
            lock, box = self._found.setdefault(key, (threading.Lock(), []))
            self._found.move_to_end(key)
            while len(self._found) > self._most:
                self._found.popitem(last=False)
        with lock:
            if not box:
                box.append(make())
            return box[0]
