"""This module reads bytes from files, spans of tars and rows of tables, on a disk or behind a URL."""

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from ccmim_fast.data.index.tables import Table, open_table
from ccmim_fast.errors import CcmimError, DataError, MachineError, one_line

_OPEN = 256  # containers kept open; a process may usually have 1,024 files
_ROW_GROUPS = 8  # of tables kept in memory: some 10 MB each


def is_remote(path: str) -> bool:
    """Tell whether `path` is a URL."""
    return "://" in path


def join(root: str, path: str) -> str:
    """Join `path` to `root`, both of a disk or of a URL."""
    if not path or is_remote(path):
        return path or root
    return f"{root.rstrip('/')}/{path}" if is_remote(root) else os.path.join(root, path)


def file_system(url: str) -> Any:
    """Return fsspec's file system of a URL. Raises MachineError: a package is missing; DataError: no such protocol."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)[0]
    except ImportError as error:
        raise MachineError(f"{url!r} cannot be read: {error}; pip install 'ccmim_fast[remote]'") from error
    except ValueError as error:
        raise DataError(f"{url!r} cannot be read: {error}") from error


@contextmanager
def as_os_errors(path: str) -> Iterator[None]:
    """Turn the other errors of fsspec's file systems, such as those of their HTTP clients, into OSError."""
    try:
        yield
    except (OSError, CcmimError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise OSError(f"{type(error).__name__}: {one_line(error, None)}") from error


@contextmanager
def open_binary(path: str) -> Iterator[io.IOBase]:
    """Open a file of a disk or a URL, to read from any position. Raises OSError, also inside the block."""
    with as_os_errors(path), file_system(path).open(path, "rb") if is_remote(path) else open(path, "rb") as file:
        yield file


class Storage:
    """A storage reads files below a folder or URL `root`, and samples of `containers` (tars or tables, paths from it).

    It may be used by many threads, and by a forked copy of this process.
    """

    def __init__(self, root: str, containers: list[str]):
        self._root, self._containers = root, containers
        self._remote = file_system(root) if is_remote(root) else None
        # A file that the cache drops is closed when its last reader is done.
        self._opened = lru_cache(_OPEN)(lambda container: io.FileIO(self._container_path(container)))
        self._tables = lru_cache(_OPEN)(self._open_table)
        self._groups = _ThreadCache(_ROW_GROUPS)

    def path(self, location: str, container: int) -> str:
        """Return the file's path, or container::member, for messages."""
        return join(self._root, location) if container < 0 else f"{self._container_path(container)}::{location}"

    def read(self, location: str, container: int, offset: int, size: int, most: int | None = None) -> bytes:
        """Read a sample whole or, with `most`, at least so many of its first bytes, if it has as many.

        The place is given as in `index_file.SCHEMA`, where `size` is called `bytes`. Raises OSError if the disk or the
        server fails, DataError if the sample does not have `size` bytes.
        """
        with as_os_errors(self._root):
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
            return self._remote.cat_file(path, 0, most) if most else self._remote.cat_file(path)
        with open(path, "rb", buffering=0) as file:
            return file.read(most or -1)

    def _read_span(self, container: int, offset: int, size: int) -> bytes:
        if self._remote is not None:
            data = self._remote.cat_file(self._container_path(container), offset, offset + size)
            if len(data) > size:
                raise OSError("the server sends whole files, not ranges of them")
            return data
        file = self._opened(container)  # a reference: if the cache closed the file, its number could be another file's
        return os.pread(file.fileno(), size, offset)

    def _read_row(self, container: int, row: int) -> bytes:
        table = self._tables(container)
        group, row_in_group = table.find(row)
        images = self._groups.get((container, group), lambda: table.images(group))
        return images[row_in_group].as_py() or b""

    def _container_path(self, container: int) -> str:
        return join(self._root, self._containers[container])

    def _open_table(self, container: int) -> Table:
        path = self._container_path(container)
        return open_table(path, self._remote.open(path, "rb") if self._remote is not None else None)


class _ThreadCache:
    """This cache keeps the last few results; threads that want the same result wait for the first of them."""

    def __init__(self, most: int):
        self._most, self._lock, self._results = most, threading.Lock(), OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        with self._lock:
            lock, result = self._results.setdefault(key, (threading.Lock(), []))
            self._results.move_to_end(key)
            while len(self._results) > self._most:
                self._results.popitem(last=False)
        with lock:
            if not result:
                result.append(make())
            return result[0]
