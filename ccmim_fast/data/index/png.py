"""This module decodes PNGs of 16-bit colours, or gray with alpha, of which Pillow keeps 8 bits.

Decoders that keep 16 bits may end the process at a damaged file; this one is NumPy alone.
"""

# H height, W width, Q bytes of a pixel, D pixels of a diagonal, S samples of a pixel, C channels

import zlib

import numpy as np

from ccmim_fast.data.index.arrays import Stored, with_channels
from ccmim_fast.errors import DataError

_SAMPLES = {2: 3, 4: 2, 6: 4}  # by the colour type: RGB, gray and alpha, RGB and alpha
_FULL = 65535.0


def is_wide_png(data: bytes) -> bool:
    """Tell whether a PNG has 16 bits a sample and more than one sample."""
    return data[24:25] == b"\x10" and data[25] in _SAMPLES


def read_wide_png(data: bytes, channels: int) -> Stored:
    """Decode a PNG for which `is_wide_png` holds; alpha is dropped, nothing is turned. Raises DataError."""
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data[28]:
        raise DataError("an interlaced PNG of 16 bits; save it without interlacing")
    samples = _SAMPLES[data[25]]
    row = 1 + 2 * samples * width
    try:
        # No more than the header claims, which was held against a limit.
        content = zlib.decompressobj().decompress(_compressed(data), height * row)
    except zlib.error as error:
        raise DataError(f"damaged pixels: {error}") from error
    if len(content) < height * row:
        raise DataError("cut off: its pixels are not all there")
    rows = np.frombuffer(content, np.uint8).reshape(height, row)
    if rows[:, 0].max() > 4:
        raise DataError("damaged pixels: a filter that PNG does not know")
    bytes_HWQ = _unfiltered(rows[:, 0], rows[:, 1:].reshape(height, width, -1))
    values_HWS = bytes_HWQ.view(">u2")[..., : 3 if samples > 2 else 1].astype(np.uint16)
    return Stored(with_channels(values_HWS, channels, rgb=True), _FULL)


def _compressed(data: bytes) -> bytes:
    """Return the content of all chunks of pixels."""
    place, parts = 8, []
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] == b"IDAT":
            parts.append(data[place + 8 : place + 8 + length])
        place += 12 + length
    return b"".join(parts)


def _unfiltered(filters_H: np.ndarray, coded_HWQ: np.ndarray) -> np.ndarray:
    """Undo PNG's filters, by which a byte is coded as its distance from those to the left and above.

    A pixel depends on pixels of the two diagonals before its own: those of one diagonal are computed at once.
    """
    H, W, _ = coded_HWQ.shape
    padded = np.zeros((H + 1, W + 1, coded_HWQ.shape[2]), dtype=np.int16)  # a row and a column of zeros before it
    for diagonal in range(H + W - 1):
        y_D = np.arange(max(0, diagonal - W + 1), min(H, diagonal + 1))
        x_D, kind_D1 = diagonal - y_D, filters_H[y_D, None]
        left, above, corner = padded[y_D + 1, x_D], padded[y_D, x_D + 1], padded[y_D, x_D]
        apart = [abs(above - corner), abs(left - corner), abs(left + above - 2 * corner)]
        paeth = np.where(
            (apart[0] <= apart[1]) & (apart[0] <= apart[2]), left, np.where(apart[1] <= apart[2], above, corner)
        )
        guess = np.choose(kind_D1, [np.zeros_like(left), left, above, (left + above) // 2, paeth])
        padded[y_D + 1, x_D + 1] = (coded_HWQ[y_D, x_D] + guess) & 255
    return np.ascontiguousarray(padded[1:, 1:].astype(np.uint8))
