"""This module reads the header and the pixels of one encoded image, with Pillow."""

# H height, W width, C channels

import io
import warnings
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError

from ccmim_fast.errors import DataError, one_line

# Our own limit on pixels, read from headers, excludes what Pillow warns about.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

MAX_PIXELS = 100_000_000  # 300 MB as RGB; faults.md, row 4
HEADER_BYTES = 2**16  # enough for the header of almost every JPEG and PNG
HEADER_FIRST = (b"\xff\xd8", b"\x89PNG")  # JPEG and PNG, whose header can be read from the first bytes
EXIF_ORIENTATION = 0x0112
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L", "I;16N")
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"  # JPEG's markers


class Header(NamedTuple):
    """A header holds what the index keeps of it, under the names of the index's columns."""

    size: tuple[int, int]  # height and width in pixels, after EXIF rotation
    plain: int  # 1: every decoder reads the file as `decode` does
    orientation: int  # EXIF, 1 .. 8
    mode: str  # Pillow's name of the pixels' mode; for arrays the dtype


def has_end(data: bytes) -> bool:
    """Tell whether a JPEG file is whole: a decoder that decodes a box of it may not notice that it is cut off."""
    # Coded pixels never contain the bytes of a marker. Bytes behind the end may look like one: the answer is then no,
    # and the caller decodes the whole image instead.
    return data.endswith(_END_OF_IMAGE) or data.rfind(_END_OF_IMAGE) > data.rfind(_START_OF_SCAN)


def read_header(data: bytes, channels: int) -> Header:
    """Read the header of an encoded image from the whole file or, for JPEG and PNG, enough of its beginning.

    Images of 1 (gray) or 3 (RGB) channels have any format that Pillow reads; those of other counts are uint8 [H, W, C]
    of .npy or TIFF. Raises DataError with the reason if the image cannot be used.
    """
    try:
        if not data:
            raise DataError("empty file")
        if channels in (1, 3):
            header = _image_header(data)
        else:
            header = Header(_array(data, channels).shape[:2], plain=0, orientation=1, mode="uint8")
        _check_size(*header.size)
    # Pillow's plugins raise errors of any type on damaged headers.
    except Exception as error:
        raise DataError(_reason(error)) from error
    return header


def decode(data: bytes, channels: int) -> np.ndarray:
    """Decode an image: [H, W, C] uint8, turned as its EXIF data say. Raises DataError with the reason.

    16-bit gray is divided by 257 and rounded; an alpha channel is dropped.
    """
    try:
        if channels not in (1, 3):
            return _array(data, channels)
        with Image.open(io.BytesIO(data)) as image:
            _check_size(image.height, image.width)
            if _orientation(image) > 1:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                # Pillow's own conversion clips at 255. 65535 / 257 = 255; no result lies halfway, since 257 is odd.
                wide_HW = np.asarray(image).astype(np.int64).clip(0, 65535)
                image = Image.fromarray(((wide_HW + 128) // 257).astype(np.uint8))
            # Otherwise Pillow warns about palettes with partly transparent entries.
            image.info.pop("transparency", None)
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
            return pixels.reshape(*pixels.shape[:2], channels)
    except Exception as error:
        raise DataError(_reason(error)) from error


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise DataError(f"no pixels: {height} x {width}")
    if height * width > MAX_PIXELS:
        raise DataError(f"{height} x {width} pixels are more than {MAX_PIXELS:,}")


def _image_header(data: bytes) -> Header:
    with Image.open(io.BytesIO(data)) as image:
        sixteen_bits = image.mode == "I" and image.format in ("PNG", "PPM")  # how Pillow < 10.3 names I;16
        if image.mode not in _MODES and not sixteen_bits:
            raise DataError(f"{image.format} pixels of mode {image.mode}: scale them to 8 or 16 bits, gray or RGB")
        orientation = _orientation(image)
        turned = orientation > 1
        # Pillow also follows an orientation in XMP, other decoders only the one in EXIF. In formats other than JPEG
        # decoders differ in more: alpha, 16 bits, gamma, EXIF behind the pixels; and no GPU decodes them anyway.
        jpeg = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")
        plain = jpeg and not (turned and "xmp" in image.info)
        width, height = image.size
        if turned and image.format == "TIFF":
            # Whether `size` is already turned depends on Pillow's version; the pixels are always turned.
            width, height = ImageOps.exif_transpose(image).size
        elif orientation >= 5:
            width, height = height, width
    return Header((height, width), int(plain), orientation, image.mode)


def _orientation(image: Image.Image) -> int:
    """Return how the header says that the pixels are mirrored or rotated, EXIF's 1 .. 8; 1: not.

    EXIF data behind a PNG's pixels do not count: Pillow would have to decode every PNG to find them.
    """
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    orientation = image.getexif().get(EXIF_ORIENTATION)
    return orientation if orientation in range(2, 9) else 1


def _array(data: bytes, channels: int) -> np.ndarray:
    """Read uint8 [H, W, C] from a .npy file or a TIFF, whose channels may be samples of a pixel, planes or pages."""
    if data.startswith(b"\x93NUMPY"):
        array = np.load(io.BytesIO(data), allow_pickle=False)
    else:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            if file.series[0].size > MAX_PIXELS * channels:
                raise DataError(f"{file.series[0].size:,} values are more than {MAX_PIXELS * channels:,}")
            array = file.asarray()
        if array.ndim == 3 and array.shape[0] == channels != array.shape[2]:
            array = np.ascontiguousarray(np.moveaxis(array, 0, 2))
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != channels:
        raise DataError(f"{array.dtype} {list(array.shape)} is not uint8 [height, width, {channels}]")
    return array


def _reason(error: Exception) -> str:
    """Return one line without the path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error, None) or type(error).__name__
