"""This module writes shards: tars of images, as WebDataset lays them out, smaller if wanted, with their index."""

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
from PIL import Image

from ccmim_fast.data.index.decode import Header, read_header
from ccmim_fast.data.index.index_file import BESIDE, Index, Listing, Row, write_index
from ccmim_fast.data.index.indexed import IndexedSource
from ccmim_fast.data.source import usable_count, usable_ids
from ccmim_fast.data.stream.permutation import epoch_order
from ccmim_fast.data.threads import map_ahead, thread_count
from ccmim_fast.errors import ConfigError, DataError


def write_shards(
    source: IndexedSource,
    folder: str,
    *,
    side: int = 0,
    quality: int = 90,
    shard_bytes: int = 2**29,
    seed: int = 0,
    workers: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Index, list[tuple[int, str]]]:
    """Write `shard-000000.tar`, ... and the index to a new or empty folder.

    The samples are in an order drawn by `seed`, so that neighbours are of all classes. Each sample has two members, the
    image and, with classes, the label as `.cls`. Bytes are copied as they are, unless the image is made smaller; a
    copied image is not decoded. Return the index and (id, reason) of the samples that are left out, since the source
    excludes them or they cannot be read.

    Args:
        side: the shorter side of larger images becomes `side` pixels; 0: no image is changed.
        quality: of the JPEG files that the smaller images are written as.
        shard_bytes: length of a shard after which the next one begins.
        workers: threads; 0: one per core.

    Raises ConfigError for `side` if images are not gray or RGB, DataError if the folder is not empty or not writable.
    """
    if side and source.channels not in (1, 3):
        raise ConfigError(f"--side={side}: images of {source.channels} channels are not resized; leave it out")
    left_out = [(index, source.index.reason(index)) for index in source.excluded_X.tolist()]
    count = usable_count(source)
    ids = usable_ids(source, epoch_order(seed, 0, count, np.arange(count))).tolist()
    threads = thread_count(workers)

    def load(index: int) -> tuple[bytes, str, Header] | str:
        try:
            return _load(source, index, side, quality)
        # OSError: the image cannot be written as JPEG, for example because a side is too long.
        except (DataError, OSError) as error:
            return str(error)

    def rows() -> Iterator[Row]:
        results = map_ahead(load, ids, threads, 8 * threads)
        with closing(writer):
            for done, (index, loaded) in enumerate(zip(ids, results, strict=True), start=1):
                report(done, count)
                if isinstance(loaded, str):
                    left_out.append((index, loaded))
                    continue
                data, suffix, header = loaded
                label = -1 if source.labels_N is None else int(source.labels_N[index])
                yield writer.add(data, suffix, label).with_header(header, len(data))

    try:
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            raise DataError(f"{folder!r} is not empty; name a new folder")
        writer = _Writer(folder, shard_bytes)
        listing = Listing(rows(), source.class_names, {}, [])
        path = os.path.join(folder, BESIDE)
        # `writer.names` grows as the rows are made.
        index = write_index(path, listing, root="", origin="", channels=source.channels, containers=writer.names)
    except OSError as error:
        raise DataError(f"cannot write tars to {folder!r}: {error.strerror or error}") from error
    return index, left_out


def shrink(image_HWC: np.ndarray, side: int, quality: int) -> bytes:
    """Encode [H, W, 1] or [H, W, 3] uint8 as JPEG with a shorter side of `side` pixels; equal channels become one."""
    height, width = image_HWC.shape[:2]
    scale = side / min(height, width)
    gray = (image_HWC[..., :1] == image_HWC[..., 1:]).all()
    image = Image.fromarray(image_HWC[..., 0] if gray else image_HWC)
    buffer = io.BytesIO()
    size = max(side, round(width * scale)), max(side, round(height * scale))
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _load(source: IndexedSource, index: int, side: int, quality: int) -> tuple[bytes, str, Header]:
    """Return the bytes to write, the suffix of their name, and their header."""
    if side and min(source.sizes_N2[index]) > side:
        data, suffix = shrink(source.decode(index), side, quality), ".jpg"
    else:
        data = source.encoded(index)
        suffix = os.path.splitext(source.index.location(index))[1].lower() or _suffix_of(data)
    return data, suffix, read_header(data, source.channels)


def _suffix_of(data: bytes) -> str:
    """Return the suffix of an image without a file name, such as a table's row."""
    with Image.open(io.BytesIO(data)) as image:
        return {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(image.format, f".{image.format.lower()}")


class _Writer:
    """This class writes the shards of a folder, one after the other."""

    def __init__(self, folder: str, most: int):
        self._folder, self._most, self._tar, self._samples = folder, most, None, 0
        self.names: list[str] = []

    def close(self) -> None:
        """Finish the last shard."""
        if self._tar is not None:
            self._tar.close()

    def add(self, data: bytes, suffix: str, label: int) -> Row:
        """Add a sample and return its row, without the header."""
        if self._tar is None or self._tar.offset > self._most:
            self.close()
            self.names.append(f"shard-{len(self.names):06d}.tar")
            path = os.path.join(self._folder, self.names[-1])
            # USTAR: a member's header is one block, which tells where its data begin.
            self._tar = tarfile.open(path, "x", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed by `close`)
        key = f"{self._samples:09d}"
        self._samples += 1
        offset = self._add_member(key + suffix, data)
        if label >= 0:
            self._add_member(key + ".cls", str(label).encode())
        return Row((key + suffix).encode(), len(self.names) - 1, offset, label=label)

    def _add_member(self, name: str, data: bytes) -> int:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        offset = self._tar.offset + tarfile.BLOCKSIZE
        self._tar.addfile(member, io.BytesIO(data))
        self._tar.members.clear()  # otherwise tarfile keeps every member of a large tar
        return offset
