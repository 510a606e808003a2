"""This module reads bytes from files, spans of tars and rows of tables, on a disk or behind a URL."""

import io
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pyarrow as pa

from ccmim_fast.data.index.endings import is_tar
from ccmim_fast.data.index.own import open_regular, read_regular
from ccmim_fast.data.index.tables import Table, bytes_of, open_table
from ccmim_fast.errors import CcmimError, DataError, MachineError, one_line
from ccmim_fast.secrets import credentials, with_credentials, without_secrets

_OPEN = 256  # containers kept open; a process may usually have 1,024 files
_ROW_GROUPS = 8  # of tables kept in memory: some 10 MB each
_GROUP_BYTES = 2**30  # of their images in memory, but for one group, whatever its size
_SILENCE = 30.0  # seconds that a server may take to connect, or between two parts of an answer
_REQUEST = 300.0  # seconds of a request as a whole: a part of a tar is 5 MB


def is_remote(path: str) -> bool:
    """Tell whether `path` is a URL."""
    return "://" in path


def is_web(url: str) -> bool:
    """Tell whether a URL is of the web: its folders are pages with links, its names are percent-encoded."""
    return url.startswith(("http://", "https://"))


def join(root: str, path: str) -> str:
    """Join `path` to `root`, both of a disk or of a URL."""
    if not path or is_remote(path):
        return path or root
    return f"{root.rstrip('/')}/{path}" if is_remote(root) else os.path.join(root, path)


def file_system(url: str, query: str = "") -> Any:
    """Return fsspec's file system of a URL; one of the web adds `query` to each request.

    Raises MachineError: a package is missing; DataError: no such place.
    """
    try:
        import fsspec

        options = {}
        if is_web(url):
            from aiohttp import ClientTimeout

            bounds = ClientTimeout(total=_REQUEST, sock_connect=_SILENCE, sock_read=_SILENCE)
            options = {"client_kwargs": {"timeout": bounds}, **({"params": query[1:]} if query else {})}
        return fsspec.core.url_to_fs(url, **options)[0]
    except ImportError as error:
        what = f"{without_secrets(url)!r} cannot be read: {error}"
        raise MachineError(f"{what}; pip install 'ccmim_fast[remote]'") from error
    except Exception as error:  # some connect at once, and fail with the errors of their own clients
        raise DataError(f"{without_secrets(url)!r} cannot be read: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Return why a place cannot be read, in words that are never empty and hold no password."""
    if isinstance(error, TimeoutError):
        return f"no answer for {_SILENCE:.0f} seconds"
    if isinstance(error, FileNotFoundError) and error.strerror is None:  # fsspec's word for every failure of a server
        cause = error.__cause__
        missing = isinstance(cause, FileNotFoundError | None) or getattr(cause, "status", 0) == 404
        return "not found" if missing else reason_of(cause)
    words = getattr(error, "strerror", None) or one_line(error, None)
    return without_secrets(words) or type(error).__name__


@contextmanager
def as_os_errors(path: str) -> Iterator[None]:
    """Turn the other errors of fsspec's file systems, such as those of their HTTP clients, into OSError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except TimeoutError as error:
        raise OSError(reason_of(error)) from error
    except (OSError, CcmimError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise OSError(f"{type(error).__name__}: {reason_of(error)}") from error


@contextmanager
def open_binary(path: str) -> Iterator[io.IOBase]:
    """Open a file of a disk or a URL, to read from any position. Raises OSError, also inside the block."""
    opened = file_system(path).open if is_remote(path) else _open_regular
    with as_os_errors(path), opened(path, "rb") as file:
        yield file


def _open_regular(path: str, mode: str) -> io.IOBase:
    return open(path, mode, opener=open_regular)


class Storage:
    """A storage reads files below a folder or URL `root`, and samples of `containers` (tars or tables, paths from it).

    It may be used by many threads, and by a forked copy of this process. `origin` is what the user has named: of a URL
    with a password or a query, these are sent with each request, whereas root, containers and names are without.
    """

    def __init__(self, root: str, containers: list[str], origin: str = ""):
        self._root, self._containers, self._credentials = root, containers, credentials(origin)
        self._remote = file_system(self.url(root)) if is_remote(root) else None
        # A file that the cache drops is closed when its last reader is done.
        self._opened = lru_cache(_OPEN)(lambda n: io.FileIO(self._container_path(n), opener=open_regular))
        self._tables = _ThreadCache(_OPEN)
        self._groups = _ThreadCache(_ROW_GROUPS, _GROUP_BYTES)

    def path(self, location: str, container: int) -> str:
        """Return the file's path, or container::member, for messages."""
        return join(self._root, location) if container < 0 else f"{self._container_path(container)}::{location}"

    @property
    def remote(self) -> bool:
        """Tell whether the files are behind a URL."""
        return self._remote is not None

    def url(self, path: str) -> str:
        """Return where a path or clean URL is read."""
        return with_credentials(path, *self._credentials) if is_remote(path) else path

    def read(self, location: str, container: int, offset: int, size: int, most: int | None = None) -> bytes:
        """Read a sample whole or, with `most`, at least so many of its first bytes, if it has as many.

        The place is given as in `index_file.SCHEMA`, where `size` is called `bytes`. Raises OSError if the disk or the
        server fails, DataError if the sample does not have `size` bytes.
        """
        with as_os_errors(self._root):
            if container < 0:
                data = self._read_file(join(self._root, location), most)
            elif is_tar(self._containers[container]):
                data = self._read_span(container, offset, size if most is None else min(size, most))
            else:
                data = self._read_row(container, offset)
        if most is None and 0 <= size != len(data):
            raise DataError(f"has {len(data)} bytes, and {size} when it was indexed")
        return data

    def _read_file(self, path: str, most: int | None) -> bytes:
        if self._remote is not None:
            return self._remote.cat_file(self.url(path), *((0, most) if most else ()))
        return read_regular(path, most)

    def _read_span(self, container: int, offset: int, size: int) -> bytes:
        if self._remote is not None:
            data = self._remote.cat_file(self.url(self._container_path(container)), offset, offset + size)
            if len(data) > size:
                raise OSError("the server sends whole files, not ranges of them")
            return data
        file = self._opened(container)  # a reference: if the cache closed the file, its number could be another file's
        return os.pread(file.fileno(), size, offset)

    def _read_row(self, container: int, row: int) -> bytes:
        table = self._tables.get(container, lambda: self._open_table(container))
        group, row_in_group = table.find(row)
        images = self._groups.get((container, group), lambda: table.images(group))
        return bytes_of(images[row_in_group])

    def _container_path(self, container: int) -> str:
        return join(self._root, self._containers[container])

    def _open_table(self, container: int) -> Table:
        path = self._container_path(container)
        return open_table(path, self._remote.open(self.url(path), "rb") if self._remote is not None else None)


class _ThreadCache:
    """This cache keeps the last few results; threads that want the same result wait for the first of them.

    An error is a result too: it is remembered and raised again, not found out again for each row.
    """

    def __init__(self, most: int, most_bytes: float = math.inf):
        self._most, self._most_bytes, self._lock, self._results = most, most_bytes, threading.Lock(), OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        with self._lock:
            lock, result = self._results.setdefault(key, (threading.Lock(), []))
            self._results.move_to_end(key)
        with lock:
            if not result:
                try:
                    result.append(make())
                except Exception as error:  # of a server's client, of any type
                    result.append(error)
                self._shrink()
        if isinstance(result[0], Exception):
            raise result[0].with_traceback(None)
        return result[0]

    def _shrink(self) -> None:
        """Drop the oldest results while there are too many or too large ones, but for the last."""
        with self._lock:
            sizes = [_size_of(*found) for _, found in self._results.values()]
            while len(sizes) > 1 and (len(sizes) > self._most or sum(sizes) > self._most_bytes):
                self._results.popitem(last=False)
                sizes.pop(0)


def _size_of(result: Any = None) -> int:
    """Return the bytes that an array of Arrow's holds; of other results 0."""
    # Up to pyarrow 22 `nbytes` raises for views.
    return result.get_total_buffer_size() if isinstance(result, pa.ChunkedArray) else 0
