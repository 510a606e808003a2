"""Images gathered into tars, as WebDataset lays them out, smaller if wanted, with their index beside them."""

import io
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import Image

from ccmim_fast.data.index.decode import Header, read_header
from ccmim_fast.data.index.index_file import BESIDE, Index, Row, write_index
from ccmim_fast.data.index.indexed import IndexedSource
from ccmim_fast.data.source import usable_count, usable_ids
from ccmim_fast.data.stream.permutation import epoch_order
from ccmim_fast.data.stream.prefetch import thread_count
from ccmim_fast.errors import ConfigError, DataError

_BLOCK = 512  # of a tar: a header is one, and data begin on one


class Sharded(NamedTuple):
    """index: of the tars. left_out: ids and reasons of the source's samples that are in none."""

    index: Index
    left_out: list[tuple[int, str]]


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
) -> Sharded:
    """Write `shard-000000.tar`, ... and the index to a new or empty folder.

    The samples are in an order drawn by `seed`, so that neighbours are of all classes. Each is two members, the image
    and, with classes, its number as `.cls`. Bytes are copied as they are, unless the image is made smaller. What the
    source excludes or what cannot be read is left out; a copied image is not decoded.

    Args:
        side: shorter side in pixels of images that are larger; 0: none is changed.
        quality: of the JPEG files that the smaller ones are written as.
        shard_bytes: after which the next tar begins.
        workers: threads; 0: one per core.

    Raises:
        ConfigError: `side` for images that are not gray or RGB.
        DataError: the folder is not empty, or cannot be written.
    """
    if side and source.channels not in (1, 3):
        raise ConfigError(f"--side={side}: images of {source.channels} channels are not resized; leave it out")
    _make_empty(folder)
    left_out = [(number, source.index.reason(number)) for number in source.excluded_X.tolist()]
    writer = _Writer(folder, shard_bytes)

    def rows() -> Iterator[Row]:
        with writer:
            for done, (number, loaded) in enumerate(_loaded(source, side, quality, seed, thread_count(workers))):
                report(done + 1, usable_count(source))
                if isinstance(loaded, str):
                    left_out.append((number, loaded))
                    continue
                label = -1 if source.labels_N is None else int(source.labels_N[number])
                yield _row(loaded, label, *writer.add(loaded.data, loaded.suffix, label))

    try:
        index = write_index(
            os.path.join(folder, BESIDE),
            rows(),
            root="",
            origin="",
            channels=source.channels,
            containers=writer.names,  # which grow as rows are made
            class_names=source.class_names,
        )
    except OSError as error:
        raise DataError(f"cannot write tars to {folder!r}: {error.strerror or error}") from error
    return Sharded(index, left_out)


def smaller(image_HWC: np.ndarray, side: int, quality: int) -> bytes:
    """A JPEG file of an [H, W, 1] or [H, W, 3] uint8 image whose shorter side is `side` pixels.

    Three equal channels are written as one.
    """
    height, width = image_HWC.shape[:2]
    share = side / min(height, width)
    size = max(side, round(width * share)), max(side, round(height * share))
    gray = (image_HWC[..., :1] == image_HWC[..., 1:]).all()
    image = Image.fromarray(image_HWC[..., 0] if gray else image_HWC)
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


class _Loaded(NamedTuple):
    data: bytes
    suffix: str
    header: Header


def _loaded(
    source: IndexedSource, side: int, quality: int, seed: int, threads: int
) -> Iterator[tuple[int, _Loaded | str]]:
    """Every usable sample in the order of `seed`: its id, and what is to be written or why it cannot be."""

    def load(number: int) -> tuple[int, _Loaded | str]:
        try:
            if side and min(source.sizes_N2[number]) > side:
                data, suffix = smaller(source.decode(number), side, quality), ".jpg"
            else:
                data = source.encoded(number)
                suffix = _suffix(source.index.location(number), data)
            return number, _Loaded(data, suffix, read_header(data, source.channels))
        # OSError: what cannot be written as JPEG, as too long a side.
        except (DataError, OSError) as error:
            return number, str(error)

    count = usable_count(source)
    ids = usable_ids(source, epoch_order(seed, 0, count, np.arange(count)))
    with ThreadPoolExecutor(threads) as pool:
        numbers = iter(ids.tolist())
        waiting = deque(pool.submit(load, number) for number in islice(numbers, 8 * threads))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(load, number) for number in islice(numbers, 1))


def _suffix(location: str, data: bytes) -> str:
    """Of the file's name; a table's row has none, its bytes tell."""
    suffix = os.path.splitext(location)[1].lower()
    if suffix:
        return suffix
    with Image.open(io.BytesIO(data)) as image:
        return {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(image.format, f".{image.format.lower()}")


def _row(loaded: _Loaded, label: int, name: str, shard: int, offset: int) -> Row:
    header = loaded.header
    return Row(
        name.encode(),
        shard,
        offset,
        len(loaded.data),
        size=(header.height, header.width),
        orientation=header.orientation,
        mode=header.mode,
        plain=int(header.plain),
        label=label,
    )


def _make_empty(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            raise DataError(f"{folder!r} is not empty; name a new folder")
    except OSError as error:
        raise DataError(f"cannot write tars to {folder!r}: {error.strerror}") from error


class _Writer:
    """The tars of a folder, one after the other."""

    def __init__(self, folder: str, most: int):
        self._folder, self._most, self._tar, self._samples = folder, most, None, 0
        self.names: list[str] = []

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tar is not None:
            self._tar.close()

    def add(self, data: bytes, suffix: str, label: int) -> tuple[str, int, int]:
        """Add a sample; returns the image's name, its tar's number, and its first byte there."""
        if self._tar is None or self._tar.offset > self._most:
            self._next()
        key = f"{self._samples:09d}"
        self._samples += 1
        offset = self._add(key + suffix, data)
        if label >= 0:
            self._add(key + ".cls", str(label).encode())
        return key + suffix, len(self.names) - 1, offset

    def _add(self, name: str, data: bytes) -> int:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        offset = self._tar.offset + _BLOCK
        self._tar.addfile(member, io.BytesIO(data))
        return offset

    def _next(self) -> None:
        self.__exit__()
        self.names.append(f"shard-{len(self.names):06d}.tar")
        # USTAR: a member's header is one block, so its data's place is known.
        self._tar = tarfile.open(os.path.join(self._folder, self.names[-1]), "x", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed by __exit__)
        self._tar.members = _Forgetful()


class _Forgetful(list):
    """Of the members written, which tarfile would keep all."""

    def append(self, member: tarfile.TarInfo) -> None:
        pass
