"""This module holds a TIFF to what it claims, before its pages are followed and its pixels are decoded."""

import lzma
import math
import struct
import zlib

from tifffile import TiffPageSeries

from ccmim_fast.errors import DataError

MOST_PAGES = 65536
# Compressions that tifffile undoes with Python's own libraries, whatever comes out, and how many times its length a
# stream may give; imagecodecs, which undoes the others, is told how many bytes to give.
_STREAMS = dict.fromkeys((8, 32946, 50013), (zlib.decompressobj, 1032)) | {34925: (lzma.LZMADecompressor, 2**13)}
_SPARE = 2**26  # bytes that a strip may give beyond those of its image: some writers fill the last one up


def check_chain(data: bytes) -> None:
    """Raise DataError if the pages of a TIFF, each of which says where the next one is, have no end or are too many."""
    order, is_big = "<" if data.startswith(b"II") else ">", data[2:4] in (b"+\0", b"\0+")
    count, entry, offset, start = ("Q", 20, "Q", 8) if is_big else ("H", 12, "I", 4)
    seen: set[int] = set()
    try:
        (place,) = struct.unpack_from(order + offset, data, start)
        while place:
            if place in seen or len(seen) >= MOST_PAGES:
                raise DataError("a TIFF whose chain of pages has no end")
            seen.add(place)
            (tags,) = struct.unpack_from(order + count, data, place)
            (place,) = struct.unpack_from(order + offset, data, place + struct.calcsize(order + count) + tags * entry)
    except struct.error:
        raise DataError("a TIFF that is cut off, or says that pages lie beyond its end") from None


def check_segments(data: bytes, series: TiffPageSeries) -> None:
    """Raise DataError if a strip or tile lies beyond the end, or gives more bytes than the whole image has."""
    image = series.keyframe
    claimed = math.prod(image.shape) * image.dtype.itemsize
    opened, times = _STREAMS.get(image.compression, (None, 0))
    for page in series.pages:
        for start, size in zip(page.dataoffsets, page.databytecounts):
            if start + size > len(data):
                raise DataError(f"cut off: it has {len(data):,} bytes, and pixels beyond them")
            # Only what may give so much is undone for it.
            if size * times > claimed + _SPARE:
                given = opened().decompress(data[start : start + size], claimed + _SPARE + 1)
                if len(given) > claimed + _SPARE:
                    raise DataError(f"a TIFF of {claimed:,} bytes with a strip that gives more")
