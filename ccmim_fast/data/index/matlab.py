"""Arrays of numbers in MATLAB's files of level 5, the kind that Flowers-102 comes in.

scipy.io.loadmat reads more kinds, but ends the process on some damaged files (scipy 1.17.1: a few bits turned).
"""

# N numbers

import struct
import zlib
from collections.abc import Iterator

import numpy as np

_HEADER = 128  # bytes, of which the last two tell the order of bytes
_MATRIX, _COMPRESSED = 14, 15  # kinds of elements
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_NUMERIC = range(6, 16)  # classes of arrays: double, single, and integers of 8 to 64 bits
_LARGEST = 2**26  # bytes of an array: a few lines of zeros may stand for gigabytes


def read_arrays(data: bytes) -> dict[str, np.ndarray]:
    """Every array of real numbers in a file, by its name: [N], column by column.

    Raises:
        ValueError: the file is damaged, or none of level 5.
    """
    order = {b"IM": "<", b"MI": ">"}.get(data[_HEADER - 2 : _HEADER])
    if order is None:
        raise ValueError("no MATLAB file of level 5")
    found = {}
    for kind, body in _elements(data[_HEADER:], order):
        if kind == _COMPRESSED:
            kind, body = next(_elements(_inflate(body), order), (0, b""))
        if kind == _MATRIX:
            found |= _array(body, order)
    return found


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(kind, content) of what stands one after the other."""
    at = 0
    while at < len(data):
        if len(data) < at + 8:
            raise ValueError("it is cut off")
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start = at + 8
        if kind >> 16:  # up to four bytes, which stand where a longer one has its size
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
            if size > 4:
                raise ValueError("an element of no possible size")
        body = data[start : start + size]
        if len(body) < size:
            raise ValueError("it is cut off")
        yield kind, body
        at = start + size
        if kind != _COMPRESSED:
            at += -at % 8


def _inflate(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        body = stream.decompress(data, _LARGEST)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not stream.eof:
        raise ValueError(f"it is cut off, or holds an array of more than {_LARGEST} bytes")
    return body


def _array(body: bytes, order: str) -> dict[str, np.ndarray]:
    """Of one array: its name and numbers; nothing of one of another kind."""
    parts = list(_elements(body, order))
    if len(parts) < 4 or len(parts[0][1]) != 8:
        raise ValueError("an array without its parts")
    (_, flags), (_, sides), (_, name), (kind, numbers) = parts[:4]
    if struct.unpack(f"{order}II", flags)[0] & 0xFF not in _NUMERIC or len(parts) > 4:  # a fifth part is imaginary
        return {}
    count = np.prod(np.frombuffer(sides, f"{order}i4"), dtype=np.float64)
    if kind not in _TYPES or np.dtype(_TYPES[kind]).itemsize * count != len(numbers):
        raise ValueError("an array of other sides than its numbers have")
    return {name.decode("latin-1"): np.frombuffer(numbers, order + _TYPES[kind])}
