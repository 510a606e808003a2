"""This module makes a source of the images of an index."""

# N samples, H height, W width, C channels

import contextlib
import hashlib
import os
import re
from collections import Counter

import numpy as np

from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.index.arrays import WHITE, Stored
from ccmim_fast.data.index.decode import BYTE, REAL, decode, decode_stored, depth_of, has_end
from ccmim_fast.data.index.index_file import UNUSABLE, Index
from ccmim_fast.data.index.own import BESIDE, check_index_place, is_index
from ccmim_fast.data.index.scan import build_index, changed, look_again
from ccmim_fast.data.index.storage import Storage, is_remote, join, reason_of
from ccmim_fast.data.progress import progress_bar
from ccmim_fast.data.source import UnreadableError, encode_pnm
from ccmim_fast.errors import DataError
from ccmim_fast.secrets import without_secrets


class IndexedSource:
    """This source reads the images of an open `index`: files, members of tars or rows of tables.

    `origin` is what the user has named; an index holds no password and no query of a URL. `max_value` is the setting
    `data.max_value`. The pixels are uint8, or float32 where numbers would be lost: if more than half of the images have
    more than 8 bits, or any has signed or real numbers.
    """

    def __init__(self, index: Index, origin: str = "", max_value: tuple[float, ...] = ()):
        self.index, self.origin, self.max_value = index, origin, max_value
        self.dtype = _type_of(index)
        self.channels, self.class_names, self.fingerprint = index.channels, index.class_names, index.fingerprint
        self.sizes_N2, self.labels_N, self.excluded_X = index.sizes_N2, index.labels_N, index.excluded_X
        self._storage = Storage(index.root, index.containers, origin)

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        return self._storage.path(self.index.location(index), self.index.containers_N[index])

    def encoded(self, index: int) -> bytes:
        """Return the image as it is stored. Raises DataError naming it; UnreadableError if it cannot be read now."""
        columns = (self.index.containers_N, self.index.offsets_N, self.index.bytes_N)
        try:
            return self._storage.read(self.index.location(index), *(int(column_N[index]) for column_N in columns))
        except OSError as error:
            kind = DataError if isinstance(error, FileNotFoundError) else UnreadableError
            raise kind(f"cannot read {self.name(index)!r}: {reason_of(error)}") from error
        except DataError as error:
            raise DataError(f"{self.name(index)!r} {error}") from error

    def decode(self, index: int) -> np.ndarray:
        """Return the pixels. An image that is damaged, gone, or of another size than indexed raises DataError."""
        return self.decoded(index, self.encoded(index))

    def decoded(self, index: int, data: bytes) -> np.ndarray:
        """Decode the bytes that `encoded` has returned."""
        try:
            image_HWC = decode(data, self.channels, self.dtype, self.max_value)
        except DataError as error:
            raise DataError(f"cannot decode {self.name(index)!r}: {error}") from error
        expected = (*self.sizes_N2[index].tolist(), self.channels)
        if image_HWC.shape != expected:
            raise DataError(f"{self.name(index)!r} was {expected} when indexed and is {image_HWC.shape} now")
        return image_HWC

    def stored(self, index: int) -> Stored:
        """Return the pixels as numbers that are stored, not scaled. Raises DataError like `decode`."""
        try:
            return decode_stored(self.encoded(index), self.channels)
        except DataError as error:
            raise DataError(f"cannot decode {self.name(index)!r}: {error}") from error

    def read(self, index: int) -> bytes:
        """Return the file itself if every decoder reads it alike, else its pixels as PGM or PPM."""
        stretched = any(value < WHITE for value in self.max_value)
        if self.index.plain_N[index] and not stretched:
            data = self.encoded(index)
            if has_end(data):
                return data
        return encode_pnm(self.decode(index))


def build(data: DataConfig, seed: int) -> IndexedSource:
    """Build the source of `data.source=images`; the seed does not matter."""
    options = {"image_key": data.image_key, "max_value": data.max_value}
    return open_images(data.root, data.channels, data.index, quiet=False, **options)


def open_images(
    origin: str,
    channels: int = 3,
    path: str = "",
    quiet: bool = True,
    rescan: bool = False,
    image_key: str = "",
    max_value: tuple[float, ...] = (),
) -> IndexedSource:
    """Open the images that `origin` names; index them if there is no index yet, or if files came or went.

    `path` is the index file; empty: beside the tars if there is one, else in the user's cache folder. `quiet`: show no
    progress bar. `rescan`: look at every file, for changes that left the folder as it was; shards with their index are
    not scanned. `max_value` is the setting `data.max_value`. For `origin`, `image_key` and the errors see
    `scan.build_index`. Raises DataError, too, if the file at `path` or one beside it is none of ours: only an index is
    written over.
    """
    origin = origin if is_remote(origin) or not origin else os.path.abspath(origin)
    named = without_secrets(origin)
    if path:
        check_index_place(path)
    path = path or index_path(origin, channels)
    previous = _previous(path, named, channels, image_key)
    if previous is not None and (previous.relocatable or not (rescan or changed(previous))):
        return IndexedSource(look_again(previous, origin), origin, max_value)
    with progress_bar(f"indexing {named}", quiet) as report:
        return IndexedSource(build_index(origin, path, channels, previous, report, image_key), origin, max_value)


def index_path(origin: str, channels: int) -> str:
    """Return the default path of the index of `origin`."""
    beside, origin = join(origin, BESIDE), without_secrets(origin)
    # An index that is damaged, or of another number of channels, stays as it is.
    if not is_remote(origin) and is_index(beside) and _previous(beside, origin, channels, "") is not None:
        return beside
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256(os.fsencode(origin)).hexdigest()[:12]
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", os.path.basename(origin.rstrip("/")))[:40]
    return os.path.join(cache, "ccmim_fast", f"{stem}-{digest}-{channels}.arrow")


def _type_of(index: Index) -> np.dtype:
    """Return the type of the pixels of all images of an index, by the modes of those that can be used."""
    counts = Counter()
    for mode, count in index.modes(index.status_N < UNUSABLE).items():
        counts[depth_of(mode)] += count
    return REAL if counts["real"] or counts["wide"] > counts["byte"] else BYTE


def _previous(path: str, origin: str, channels: int, image_key: str) -> Index | None:
    """Return the index at `path`, if it is an index of these images."""
    with contextlib.suppress(DataError):
        index = Index(path)
        if index.relocatable:  # shards have one image a sample
            return index if (index.channels, index.root) == (channels, origin) else None
        if (index.channels, index.origin, index.image_key) == (channels, origin, image_key):
            return index
    return None
