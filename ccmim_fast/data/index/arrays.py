"""This module reads images of any depth as the numbers that are stored, and scales them to one white for all."""

# H height, W width, S stored samples of a pixel, C channels

import io
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from ccmim_fast.data.index.formats import check_size
from ccmim_fast.errors import DataError

WHITE = 255.0  # the full scale of pixels in a batch, whatever their type
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as in Pillow's conversion to gray
_PNM = re.compile(rb"P([56])" + 3 * rb"(?:\s|#[^\r\n]*[\r\n])+(\d{1,10})" + rb"\s")
_SIZ = b"\xff\x4f\xff\x51"  # begins the codestream of JPEG 2000, with its size


class Stored(NamedTuple):
    """Pixels are here as a file stores them; `full` is the number that its format or its type makes white."""

    values_HWC: np.ndarray  # bool, whole or real numbers
    full: float

    def limits(self, max_value: tuple[float, ...]) -> np.ndarray:
        """Return the numbers that are white by `data.max_value`, [C] or [1] float64; empty: `full`.

        Whole numbers are never scaled by more than their format can hold, so that 8-bit images keep their white beside
        images of 12 bits.
        """
        limits = np.array(max_value or (self.full,), dtype=np.float64)
        return limits if self.values_HWC.dtype.kind == "f" else np.minimum(limits, self.full)


class Unread(NamedTuple):
    """An image whose header was read, and whose pixels are read by `read`, upright."""

    size: tuple[int, int]  # height and width in pixels, after any rotation
    mode: str  # the type of the numbers, such as uint16, and behind a comma what is to be known of their places
    read: Callable[[], Stored]
    orientation: int = 1  # EXIF, 1 .. 8


def full_scale(dtype: np.dtype) -> float:
    """Return the number that stands for white where nothing says more: a whole type's largest, 1 of real numbers."""
    return float(np.iinfo(dtype).max) if dtype.kind in "iu" else 1.0


def check_type(dtype: np.dtype) -> None:
    """Raise DataError for numbers that are no pixels: complex ones, objects, records, text."""
    if dtype.kind not in "biuf":
        raise DataError(f"values of type {dtype}; pixels are whole or real numbers")


def scaled(stored: Stored, dtype: np.dtype, max_value: tuple[float, ...] = ()) -> np.ndarray:
    """Scale stored values to 0 .. 255, rounded for uint8, as they come for float32: [H, W, C] of `dtype`.

    For `max_value` see `Stored.limits`. Raises DataError for values that are not finite, and for signed or real ones
    where uint8 is asked for.
    """
    values_HWC = stored.values_HWC
    if dtype == values_HWC.dtype == np.uint8 and stored.full == WHITE <= min(max_value, default=WHITE):
        return values_HWC
    limits = stored.limits(max_value)
    real = values_HWC.dtype.kind == "f"
    if dtype == np.uint8:
        if real or values_HWC.dtype.kind == "i":
            raise DataError(f"{values_HWC.dtype.name} pixels, and 8 bits are read here; scale them to 8 bits")
        return np.rint(values_HWC * WHITE / limits).clip(0, WHITE).astype(np.uint8)
    wide = np.float64 if values_HWC.dtype.itemsize > 2 else np.float32
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of them is counted
        found_HWC = (values_HWC.astype(wide) * (WHITE / limits).astype(wide)).astype(np.float32)
    if real and (count := found_HWC.size - np.count_nonzero(np.isfinite(found_HWC))):
        raise DataError(f"{count:,} of {found_HWC.size:,} values are NaN, infinite or beyond float32; fill them first")
    return found_HWC


def with_channels(values_HWS: np.ndarray, channels: int, rgb: bool) -> np.ndarray:
    """Return the asked channels: gray becomes RGB, and RGB gray. Raises DataError where the numbers do not fit."""
    count = values_HWS.shape[2]
    if count == channels:
        return values_HWS
    if count == 1 and channels == 3:
        return values_HWS.repeat(3, axis=2)
    if rgb and count == 3 and channels == 1:
        gray_HW1 = (values_HWS @ _LUMA)[..., None]
        return gray_HW1 if values_HWS.dtype.kind == "f" else np.rint(gray_HW1).astype(values_HWS.dtype)
    raise DataError(not_channels(count, channels))


def not_channels(count: int, channels: int) -> str:
    """Return the reason that an image has another number of channels than the run."""
    return f"it has {count} channel{'' if count == 1 else 's'}, not {channels}; data.channels={count} reads such images"


def read_npy(data: bytes, channels: int, least: int) -> Unread:
    """Read the header of a .npy file: [H, W], [H, W, C] or [C, H, W].

    `data` may be the beginning of the file alone, of `least` bytes or more.

    Raises DataError for another shape, and from `read` for a file that is cut off. Nothing is unpickled.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise DataError(f".npy of version {version[0]}.{version[1]}; save the array again by numpy.save")
    shape, in_columns, dtype = readers[version](file)
    check_type(dtype)
    place = _places_in(shape, channels)
    if place is None:
        raise DataError(f"{dtype.name} {list(shape)} is not [height, width, {channels}] or [{channels}, height, width]")
    height, width = place[:2]
    check_size(height, width)
    start, count = file.tell(), math.prod(shape)

    def check_end(end: int) -> None:
        if len(data) < end:
            raise DataError(f"cut off: {len(data) - start:,} of {count * dtype.itemsize:,} bytes of pixels")

    check_end(min(start + count * dtype.itemsize, least))

    def read() -> Stored:
        check_end(start + count * dtype.itemsize)
        array = np.frombuffer(data, dtype, count, start).reshape(shape, order="F" if in_columns else "C")
        array_HWS = np.moveaxis(array, 0, 2) if place[2] else array.reshape(height, width, -1)
        values_HWC = with_channels(array_HWS.astype(dtype.newbyteorder("="), copy=False), channels, rgb=False)
        return Stored(np.ascontiguousarray(values_HWC), full_scale(dtype))

    return Unread((height, width), dtype.name, read)


def _places_in(shape: tuple[int, ...], channels: int) -> tuple[int, int, bool] | None:
    """Return height, width and whether the channels come first; None for a shape that has no such channels.

    Where both ends could be the channels, they come last. One channel may be asked for as three, like a gray image.
    """
    if len(shape) == 2 and channels in (1, 3):
        return *shape, False
    for count in (channels, 1) if channels == 3 else (channels,):
        if len(shape) == 3 and count in (shape[2], shape[0]):
            return (*shape[:2], False) if shape[2] == count else (*shape[1:], True)
    return None


def read_wide_pnm(data: bytes, channels: int) -> Unread | None:
    """Read a PGM or PPM of more than 8 bits, whose header states its full scale; None for any other image."""
    found = _PNM.match(data[: 2**16])
    if found is None or not 255 < int(found[4]) < 65536:
        return None
    samples = 1 if found[1] == b"5" else 3
    width, height, full = (int(number) for number in found.groups()[1:])
    check_size(height, width)

    def read() -> Stored:
        if len(data) < found.end() + 2 * height * width * samples:
            raise DataError("cut off: its pixels are not all there")
        values = np.frombuffer(data, ">u2", height * width * samples, found.end()).astype(np.uint16)
        return Stored(with_channels(values.reshape(height, width, samples), channels, rgb=True), full)

    return Unread((height, width), "uint16", read)


def read_wide_gray(data: bytes, image: Image.Image, channels: int) -> Stored:
    """Take the pixels of a gray image that Pillow opened with more than 8 bits, as they were stored."""
    values_HW1 = np.asarray(image)[..., None]
    if values_HW1.dtype.kind == "i":  # mode I: how Pillow < 10.3 names 16 bits
        values_HW1 = values_HW1.astype(np.uint16)
    full = full_scale(values_HW1.dtype)
    if image.format == "JPEG2000":
        # Pillow shifts the bits of the file to the top of 16.
        bits = check_jpeg2000(data)
        values_HW1, full = values_HW1 >> (16 - bits), float(2**bits - 1)
    return Stored(with_channels(values_HW1, channels, rgb=False), full)


def check_jpeg2000(data: bytes) -> int:
    """Return the bits of the first component of a JPEG 2000 image, from the codestream, which decoders allocate for.

    Raises DataError if it is larger than `MAX_PIXELS`, or of signed numbers, which Pillow shifts.
    """
    start = data.find(_SIZ)
    if start < 0 or len(data) < start + 43:
        raise DataError("JPEG 2000 without the header of its codestream")
    right, bottom, left, top = (int.from_bytes(data[start + 8 + 4 * i : start + 12 + 4 * i], "big") for i in range(4))
    check_size(bottom - top, right - left)
    if data[start + 42] & 128:
        raise DataError("JPEG 2000 of signed numbers; convert it to TIFF")
    return (data[start + 42] & 127) + 1
