"""This module knows the formats of images by their first bytes; Pillow is asked for these alone, of the many it has."""

import importlib
import importlib.util
import io
import os
import warnings

from PIL import Image, UnidentifiedImageError

from ccmim_fast.errors import DataError, one_line

MAX_PIXELS = 100_000_000  # 300 MB as RGB; faults.md, row 4
_PLUGINS = {
    "JPEG": "JpegImagePlugin",
    "PNG": "PngImagePlugin",
    "WEBP": "WebPImagePlugin",
    "TIFF": "TiffImagePlugin",
    "BMP": "BmpImagePlugin",
    "DIB": "BmpImagePlugin",  # a BMP without the header of its file
    "GIF": "GifImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
    "PPM": "PpmImagePlugin",
    "AVIF": "AvifImagePlugin",  # from Pillow 11.3 on
}
# Our own limit on pixels, read from headers, excludes what Pillow warns about.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
for _plugin in _PLUGINS.values():
    if importlib.util.find_spec(f"PIL.{_plugin}") is not None:
        importlib.import_module(f"PIL.{_plugin}")
FORMATS = tuple(name for name in _PLUGINS if name in Image.OPEN)

_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",  # BigTIFF
    b"MM\0+": "TIFF",
    b"\x93NUMPY": "NPY",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
    **{b"P%d" % number: "PPM" for number in range(1, 7)},
}
_DIB_HEADERS = tuple(size.to_bytes(4, "little") for size in (40, 52, 56, 64, 108, 124))  # behind it one plane
# What people have images in, and no reader here reads.
_OTHERS = {
    b"\xff\x0a": "a JPEG XL file",
    b"\0\0\0\x0cJXL ": "a JPEG XL file",
    b"8BPS": "a Photoshop file",
    b"%!PS": "a PostScript file",
    b"%PDF": "a PDF file",
    b"\x89HDF": "an HDF5 file",
    b"SIMPLE  =": "a FITS file",
    b"PK\x03\x04": "a ZIP archive, such as .npz",
    b"P7\n": "a PAM file",
    b"Pf\n": "a PFM file",
    b"PF\n": "a PFM file",
}


def format_of(data: bytes) -> str:
    """Return Pillow's name of the format that some bytes begin like, NPY for NumPy's; empty for none that is read."""
    for start, name in _STARTS.items():
        if data.startswith(start):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:4] in _DIB_HEADERS and data[12:14] == b"\1\0":
        return "DIB"
    return "AVIF" if data[4:12] in (b"ftypavif", b"ftypavis") else ""


def open_picture(source: bytes | str | os.PathLike) -> Image.Image:
    """Open an encoded image, or the file at a path, by Pillow, as one of `FORMATS`; its pixels are not decoded yet.

    Raises DataError with the reason for one that is none of them, or is too large; OSError for a file that cannot be
    read.
    """
    if not isinstance(source, bytes):
        with open(source, "rb") as file:
            source = file.read()
    try:
        image = Image.open(io.BytesIO(source), formats=FORMATS)
    except UnidentifiedImageError:
        raise DataError(_why_not(source)) from None
    check_size(image.height, image.width)
    return image


def check_size(height: int, width: int) -> None:
    """Raise DataError for an image without pixels, or with more than `MAX_PIXELS`."""
    if min(height, width) < 1:
        raise DataError(f"no pixels: {height} x {width}")
    if height * width > MAX_PIXELS:
        raise DataError(f"{height} x {width} pixels are more than {MAX_PIXELS:,}")


def suffix_of(data: bytes) -> str:
    """Return the usual ending of a file with such a content, such as `.jpg`; empty for none that is read."""
    name = format_of(data).lower()
    return {"jpeg": ".jpg", "tiff": ".tif", "jpeg2000": ".jp2"}.get(name, f".{name}" if name else "")


def _why_not(data: bytes) -> str:
    """Return why Pillow identifies no image: it swallows its plugins' reasons."""
    name = format_of(data)
    if name in Image.OPEN:
        try:
            Image.OPEN[name][0](io.BytesIO(data), "")
        except Exception as error:  # of any type, as in all of Pillow's plugins
            return f"a {name} file that Pillow cannot read: {one_line(error, None) or type(error).__name__}"
    if name:
        return f"a file of the format {name}, which this Pillow does not read: pip install --upgrade pillow"
    other = next((what for start, what in _OTHERS.items() if data.startswith(start)), "")
    if data[4:8] == b"ftyp":
        other = "a HEIF file or a film"
    elif data[128:132] == b"DICM":
        other = "a DICOM file"
    return f"{other}, which is not read: convert it to PNG or TIFF" if other else "not an image that Pillow knows"
