"""This file writes images of IDX files, the format of MNIST and its kin, as a table that runs and evaluations read."""

# N images, H height, W width

import gzip
import io
import math
import os
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ccmim_fast.data.index.formats import check_size
from ccmim_fast.errors import DataError

_BYTES = 0x08  # the type of the numbers: unsigned ones of 8 bits; no data set of images has another
_ROWS = 4096  # of a row group, which a loader reads at once


def write_table(images: str, labels: str, out: str) -> int:
    """Write a parquet file of PNG images, and with `labels`, which may be "", their classes; return how many.

    Args:
        images, labels: IDX files [N, H, W] and [N], as they are or compressed by gzip.
        out: a new file, whose name ends in .parquet.

    Raises:
        DataError: a file cannot be read or written, is no IDX file of these dimensions, is cut off or longer than it
            says; or there are more labels than images, or fewer.
    """
    images_NHW = read_idx(images, 3)
    columns: dict[str, pa.Array | list] = {"image": [_png(image_HW) for image_HW in images_NHW]}
    if labels:
        labels_N = read_idx(labels, 1)
        if len(labels_N) != len(images_NHW):
            raise DataError(f"{labels!r} has {len(labels_N):,} labels, {images!r} has {len(images_NHW):,} images")
        columns["label"] = pa.array(labels_N.astype(np.int64))
    try:
        with open(out, "xb") as file:
            try:
                pq.write_table(pa.table(columns), file, row_group_size=_ROWS, compression="none")  # PNG is compressed
            except BaseException:
                os.unlink(out)  # a half one
                raise
    except OSError as error:
        raise DataError(f"cannot write {out!r}: {error.strerror or error}") from error
    return len(images_NHW)


def read_idx(path: str, dimensions: int) -> np.ndarray:
    """Read an IDX file of bytes with so many dimensions, uint8. Raises DataError as `write_table` does."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path!r}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) < 4 or data[:2] != b"\0\0":
        raise DataError(f"{path!r} is no IDX file: it does not begin with two zeros, a type and a number of dimensions")
    if data[2] != _BYTES or data[3] != dimensions:
        what = f"{'images [N, H, W]' if dimensions == 3 else 'labels [N]'} are of type 0x{_BYTES:02x} and {dimensions}"
        raise DataError(f"{path!r}: type 0x{data[2]:02x} of {data[3]} dimensions; {what}")
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise DataError(f"{path!r} is cut off in its header")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    if dimensions == 3:
        check_size(*shape[1:])
    if len(data) - start != math.prod(shape):
        raise DataError(f"{path!r}: {list(shape)} are {math.prod(shape):,} bytes, and {len(data) - start:,} are there")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _png(image_HW: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_HW).save(file, "PNG")
    return file.getvalue()
