"""This module reads the header and the pixels of one encoded image: with Pillow, or as an array of numbers."""

# H height, W width, C channels

import re
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ccmim_fast.data.index.arrays import (
    WHITE,
    Stored,
    Unread,
    check_jpeg2000,
    read_npy,
    read_wide_gray,
    read_wide_pnm,
    scaled,
)
from ccmim_fast.data.index.formats import format_of, open_picture
from ccmim_fast.data.index.png import is_wide_png, read_wide_png
from ccmim_fast.data.index.tiff import read_tiff, turned
from ccmim_fast.errors import DataError, one_line

HEADER_BYTES = 2**16  # enough for the header of almost every JPEG and PNG; a shorter file is read whole
HEADER_FIRST = (b"\xff\xd8", b"\x89PNG", b"\x93NUMPY")  # whose header can be read from the first bytes
BYTE, REAL = np.dtype(np.uint8), np.dtype(np.float32)  # types of the pixels that a run works on
EXIF_ORIENTATION = 0x0112
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L", "I;16N")
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG's markers of a frame, by kind
_COMMON_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"  # JPEG's markers


class Header(NamedTuple):
    """A header holds what the index keeps of it, under the names of the index's columns."""

    size: tuple[int, int]  # height and width in pixels, after EXIF rotation
    plain: int  # 1: every decoder reads the file as `decode` does
    orientation: int  # EXIF, 1 .. 8
    mode: str  # Pillow's name of the pixels' mode; for arrays the dtype, see `arrays.Unread`


def has_end(data: bytes) -> bool:
    """Tell whether a JPEG file is whole: a decoder that decodes a box of it may not notice that it is cut off."""
    # Coded pixels never contain the bytes of a marker. Bytes behind the end may look like one: the answer is then no,
    # and the caller decodes the whole image instead.
    return data.endswith(_END_OF_IMAGE) or data.rfind(_END_OF_IMAGE) > data.rfind(_START_OF_SCAN)


def read_header(data: bytes, channels: int) -> Header:
    """Read the header of an encoded image from the whole file or, for `HEADER_FIRST`, enough of its beginning.

    Images of 1 (gray) or 3 (RGB) channels have any format of `formats`; those of other counts are .npy or TIFF. Raises
    DataError with the reason if the image cannot be used.
    """
    try:
        if not data:
            raise DataError("empty file")
        unread = _array(data, channels)
        if unread is None:
            return _picture_header(data)
        return Header(unread.size, plain=0, orientation=unread.orientation, mode=unread.mode)
    # Pillow's plugins raise errors of any type on damaged headers, and so does tifffile.
    except Exception as error:
        raise DataError(_reason(error)) from error


def decode(data: bytes, channels: int, dtype: np.dtype = BYTE, max_value: tuple[float, ...] = ()) -> np.ndarray:
    """Decode an image: [H, W, C] of `dtype`, uint8 or float32, on a scale of 0 .. 255, turned as its EXIF data say.

    White is what the format or the type of the numbers makes it, or `max_value`, see `arrays.scaled`; uint8 is rounded.
    An alpha channel is dropped; JPEG in colour becomes gray by its stored luma. Raises DataError with the reason.
    """
    return scaled(decode_stored(data, channels), dtype, max_value)


def decode_stored(data: bytes, channels: int) -> Stored:
    """Decode an image to the numbers that are stored, upright. Raises DataError with the reason."""
    try:
        unread = _array(data, channels)
        return _picture(data, channels) if unread is None else unread.read()
    # Pillow's plugins raise errors of any type on damaged pixels, and so does tifffile.
    except Exception as error:
        raise DataError(_reason(error)) from error


def depth_of(mode: str) -> str:
    """Return what pixels of a `Header.mode` are: `byte`, `wide` (up to 16 bits), or `real` (signed, longer, real)."""
    name = mode.partition(",")[0]
    if name.startswith("I;16") or name in ("I", "uint16"):
        return "wide"
    return "real" if name == "F" or re.match(r"float|int|uint(?!8$)", name) else "byte"


def _array(data: bytes, channels: int) -> Unread | None:
    """Return the image of a file that holds numbers of any depth; None for one that Pillow is to read."""
    kind = format_of(data)
    if kind == "NPY":
        return read_npy(data, channels, HEADER_BYTES)
    if kind == "TIFF":
        return read_tiff(data, channels)
    if channels not in (1, 3):
        what = f"a {kind} file has 1 or 3 channels; " if kind else ""
        raise DataError(f"{what}images of {channels} channels are TIFF or .npy files")
    return read_wide_pnm(data, channels) if kind == "PPM" else None


def _picture_header(data: bytes) -> Header:
    with open_picture(data) as image:
        _check_picture(data, image)
        orientation = _orientation(image)
        is_turned = orientation > 1
        # Pillow also follows an orientation in XMP, other decoders only the one in EXIF. In formats other than JPEG
        # decoders differ in more: alpha, 16 bits, gamma, EXIF behind the pixels; and no GPU decodes them anyway.
        jpeg = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and _is_common_jpeg(data)
        plain = jpeg and not (is_turned and "xmp" in image.info)
        width, height = image.size
        if is_turned and image.format == "TIFF":
            # Whether `size` is already turned depends on Pillow's version; the pixels are always turned.
            width, height = ImageOps.exif_transpose(image).size
        elif orientation >= 5:
            width, height = height, width
        mode = "uint16" if image.format == "PNG" and is_wide_png(data) else image.mode
    return Header((height, width), int(plain), orientation, mode)


def _picture(data: bytes, channels: int) -> Stored:
    with open_picture(data) as image:
        _check_picture(data, image)
        orientation = _orientation(image)
        if image.format == "PNG" and is_wide_png(data):
            stored = read_wide_png(data, channels)
            return stored._replace(values_HWC=turned(stored.values_HWC, orientation))
        if channels == 1 and image.format in ("JPEG", "MPO"):
            image.draft("L", None)  # the luma as it is stored, which DALI gives too
        if orientation > 1:
            form, image = image.format, ImageOps.exif_transpose(image)
            image.format = form
        if image.mode.startswith("I"):
            return read_wide_gray(data, image, channels)
        # Otherwise Pillow warns about palettes with partly transparent entries.
        image.info.pop("transparency", None)
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        return Stored(pixels.reshape(*pixels.shape[:2], channels), WHITE)


def _check_picture(data: bytes, image: Image.Image) -> None:
    if image.format == "JPEG2000":
        check_jpeg2000(data)
    sixteen_bits = image.mode == "I" and image.format in ("PNG", "PPM")  # how Pillow < 10.3 names I;16
    if image.mode not in _MODES and not sixteen_bits:
        raise DataError(f"{image.format} pixels of mode {image.mode}: scale them to 8 or 16 bits, gray or RGB")


def _is_common_jpeg(data: bytes) -> bool:
    """Tell whether a JPEG is baseline, extended or progressive, of 8 bits and Huffman codes: what every decoder reads.

    Lossless and arithmetic ones, and those of 12 bits, are read by some.
    """
    place = 2
    while data[place : place + 1] == b"\xff":
        marker = data[place + 1]
        if marker in _FRAMES:
            return marker in _COMMON_FRAMES and data[place + 4] == 8
        # Fill bytes, and markers that stand alone, have no length.
        alone = marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8
        place += (1 if marker == 0xFF else 2) if alone else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


def _orientation(image: Image.Image) -> int:
    """Return how the header says that the pixels are mirrored or rotated, EXIF's 1 .. 8; 1: not.

    EXIF data behind a PNG's pixels do not count: Pillow would have to decode every PNG to find them.
    """
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    orientation = image.getexif().get(EXIF_ORIENTATION)
    return orientation if orientation in range(2, 9) else 1


def _reason(error: Exception) -> str:
    """Return one line without the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error, None) or type(error).__name__
