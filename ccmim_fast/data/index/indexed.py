"""The images of an index, as a source."""

# N samples, H height, W width, C channels

import hashlib
import os
import re

import numpy as np

from ccmim_fast.data.index.decode import decode, has_end
from ccmim_fast.data.index.index_file import BESIDE, Index
from ccmim_fast.data.index.scan import build_index, changed
from ccmim_fast.data.index.storage import Storage, is_remote, join
from ccmim_fast.data.progress import progress_bar
from ccmim_fast.data.source import UnreadableError, encode_pnm
from ccmim_fast.errors import DataError

_MAGIC = b"ARROW1"  # how every Arrow file begins


class IndexedSource:
    """Images of files, tars or tables; a `Source`.

    Attributes:
        index: the open index.
    """

    def __init__(self, index: Index):
        self.index = index
        self.channels, self.class_names = index.channels, index.class_names
        self.sizes_N2, self.labels_N, self.excluded_X = index.sizes_N2, index.labels_N, index.excluded_X
        self.fingerprint = index.fingerprint
        self._storage = Storage(index.root, index.containers)

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        """See `Source`."""
        return self._storage.path(self.index.location(index), self.index.containers_N[index])

    def encoded(self, index: int) -> bytes:
        """The image as it is stored. Raises DataError naming it; UnreadableError if it is there and cannot be read."""
        rows = self.index
        try:
            return self._storage.read(
                rows.location(index),
                int(rows.containers_N[index]),
                int(rows.offsets_N[index]),
                int(rows.bytes_N[index]),
            )
        except OSError as error:
            kind = DataError if isinstance(error, FileNotFoundError) else UnreadableError
            raise kind(f"cannot read {self.name(index)!r}: {error.strerror or error}") from error
        except DataError as error:
            raise DataError(f"{self.name(index)!r} {error}") from error

    def decode(self, index: int) -> np.ndarray:
        """See `Source`. An image that is damaged, gone, or of another size than indexed raises DataError naming it."""
        return self.decoded(index, self.encoded(index))

    def decoded(self, index: int, data: bytes) -> np.ndarray:
        """`decode` of what `encoded` gave."""
        try:
            image_HWC = decode(data, self.channels)
        except DataError as error:
            raise DataError(f"cannot decode {self.name(index)!r}: {error}") from error
        expected = (*self.sizes_N2[index].tolist(), self.channels)
        if image_HWC.shape != expected:
            raise DataError(f"{self.name(index)!r} was {expected} when indexed and is {image_HWC.shape} now")
        return image_HWC

    def read(self, index: int) -> bytes:
        """See `Source`: the file itself where every decoder reads it alike, else its pixels as PGM or PPM."""
        if self.index.plain_N[index]:
            data = self.encoded(index)
            if has_end(data):
                return data
        return encode_pnm(self.decode(index))


def open_images(
    origin: str, channels: int = 3, path: str = "", quiet: bool = True, rescan: bool = False
) -> IndexedSource:
    """The images that `origin` names, indexed now if they were not yet, or again if files came or went.

    Args:
        origin: see `scan.build_index`.
        path: the index file; empty: beside the tars if there is one, else in the user's cache folder.
        quiet: no progress bar.
        rescan: look at every file, for changes that left their folder as it was; tars with their index stay
            as they are.

    Raises:
        DataError: see `build_index`.
    """
    origin = origin if is_remote(origin) or not origin else os.path.abspath(origin)
    if path:
        _refuse_other_files(path)
    path = path or index_path(origin, channels)
    previous = _previous(path, origin, channels)
    if previous is not None and (previous.relocatable or not (rescan or changed(previous))):
        return IndexedSource(previous)
    with progress_bar(f"indexing {origin}", quiet) as report:
        return IndexedSource(build_index(origin, path, channels, previous, report))


def index_path(origin: str, channels: int) -> str:
    """Where the index of `origin` is looked for and put, if nobody says."""
    beside = join(origin, BESIDE)
    # One that is damaged, or of another number of channels, stays as it is.
    if not is_remote(origin) and _previous(beside, origin, channels) is not None:
        return beside
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256(os.fsencode(origin)).hexdigest()[:12]
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", os.path.basename(origin.rstrip("/")))[:40]
    return os.path.join(cache, "ccmim_fast", f"{stem}-{digest}-{channels}.arrow")


def _refuse_other_files(path: str) -> None:
    """Raise unless a file that a user named may be written over: it is an Arrow file, or none yet."""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            if file.read(len(_MAGIC)) not in (_MAGIC, b""):
                raise DataError(f"{path!r} is no index, and is not written over; set data.index to another file")


def _previous(path: str, origin: str, channels: int) -> Index | None:
    """The index that is there, if it is one of these images."""
    if not os.path.isfile(path):
        return None
    try:
        index = Index(path)
    except DataError:
        return None
    of_these = index.root == origin if index.relocatable else index.origin == origin
    return index if index.channels == channels and of_these else None
