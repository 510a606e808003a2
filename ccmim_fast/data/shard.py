"""This module writes shards: tars of images, as WebDataset lays them out, smaller if wanted, with their index."""

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial

import numpy as np
from PIL import Image, ImageOps

from ccmim_fast.data.index.decode import Header, depth_of, read_header
from ccmim_fast.data.index.endings import file_suffixes
from ccmim_fast.data.index.formats import suffix_of
from ccmim_fast.data.index.index_file import Index, Listing, Row, write_index
from ccmim_fast.data.index.indexed import IndexedSource
from ccmim_fast.data.index.own import BESIDE
from ccmim_fast.data.source import usable_count, usable_ids
from ccmim_fast.data.stream.permutation import epoch_order
from ccmim_fast.data.threads import map_ahead, thread_count
from ccmim_fast.errors import ConfigError, DataError

_Sample = tuple[bytes, str, int, Header]  # encoded image, suffix of its name, label (-1: none), header


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
    image and, with classes, the label as `.cls`. Bytes are copied without decoding, unless the image is made smaller.
    The arguments are those of `ccmim data shard --help`.

    Return the index, and (id, reason) of the samples that the source excludes or that cannot be read. Raises
    ConfigError for `side` if images are not gray or RGB of 8 bits, DataError if the folder is not empty, not writable.
    """
    if side and source.channels not in (1, 3):
        raise ConfigError(f"--side={side}: images of {source.channels} channels are not resized; leave it out")
    if side and source.dtype != np.uint8:
        raise ConfigError(f"--side={side}: most images have more than 8 bits, and JPEG has 8; leave it out")
    left_out = [(index, source.index.reason(index)) for index in source.excluded_X.tolist()]
    count = usable_count(source)
    ids = usable_ids(source, epoch_order(seed, 0, count, np.arange(count))).tolist()
    threads = thread_count(workers)

    def samples() -> Iterator[_Sample]:
        results = map_ahead(partial(_load, source, side, quality), ids, threads, 8 * threads)
        for done, (index, loaded) in enumerate(zip(ids, results, strict=True), start=1):
            report(done, count)
            if isinstance(loaded, str):
                left_out.append((index, loaded))
            else:
                yield loaded

    try:
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            raise DataError(f"{folder!r} is not empty; name a new folder")
        tars: list[str] = []  # grows as the rows are made
        rows = _write_tars(folder, shard_bytes, samples(), tars)
        listing = Listing("", rows, source.class_names, {}, [], tars)
        index = write_index(os.path.join(folder, BESIDE), listing, origin="", channels=source.channels)
    except OSError as error:
        raise DataError(f"cannot write tars to {folder!r}: {error.strerror or error}") from error
    return index, left_out


def shrink(image_HWC: np.ndarray, side: int, quality: int) -> bytes:
    """Encode [H, W, 1] or [H, W, 3] uint8 as JPEG with a shorter side of `side` pixels; equal channels become one."""
    gray = (image_HWC[..., :1] == image_HWC[..., 1:]).all()
    image = Image.fromarray(image_HWC[..., 0] if gray else image_HWC)
    buffer = io.BytesIO()
    ImageOps.cover(image, (side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _load(source: IndexedSource, side: int, quality: int, index: int) -> _Sample | str:
    """Return a sample, or the reason why there is none."""
    try:
        # Of more than 8 bits, a few among others: JPEG would hold 8 of them.
        if side and min(source.sizes_N2[index]) > side and depth_of(source.index.row(index).mode) == "byte":
            data, suffix = shrink(source.decode(index), side, quality), ".jpg"
        else:
            data, suffix = source.encoded(index), os.path.splitext(source.index.location(index))[1].lower()
        if suffix not in file_suffixes(source.channels):  # of a table's row
            suffix = suffix_of(data)
        label = -1 if source.labels_N is None else int(source.labels_N[index])
        return data, suffix, label, read_header(data, source.channels)
    # OSError: the image cannot be written as JPEG, for example because a side is too long.
    except (DataError, OSError) as error:
        return str(error)


def _write_tars(folder: str, most: int, samples: Iterable[_Sample], names: list[str]) -> Iterator[Row]:
    """Write samples to tars of about `most` bytes, whose names are added to `names`, and yield the row of each."""
    tar = None
    with ExitStack() as last:
        for number, (data, suffix, label, header) in enumerate(samples):
            if tar is None or tar.offset > most:
                last.close()
                names.append(f"shard-{len(names):06d}.tar")
                path = os.path.join(folder, names[-1])
                # USTAR: a member's header is one block, which tells where its data begin.
                tar = last.enter_context(tarfile.open(path, "x", format=tarfile.USTAR_FORMAT))
            key = f"{number:09d}"
            row = Row((key + suffix).encode(), len(names) - 1, tar.offset + tarfile.BLOCKSIZE, label=label)
            members = [(key + suffix, data)]
            if label >= 0:
                members.append((key + ".cls", str(label).encode()))
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            tar.members.clear()  # otherwise tarfile keeps every member of a large tar
            yield row.with_header(header, len(data))
