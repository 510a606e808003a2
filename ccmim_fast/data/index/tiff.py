"""This module reads TIFFs of any depth and number of channels, as microscopes, satellites and cameras write them.

tifffile reads them. What Pillow reads as well, one image of 8 bits in gray or colours, is left to Pillow, which has
more compressions built in; so are 16 bits whose compression tifffile cannot undo without the package imagecodecs.
"""

# H height, W width, S samples of a pixel, C channels, P pages

import importlib.util
import io
import logging
import math
import re

import numpy as np
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC, TIFF, TiffFile, TiffPage, TiffPageSeries

from ccmim_fast.data.index.arrays import (
    Stored,
    Unread,
    check_type,
    full_scale,
    not_channels,
    with_channels,
)
from ccmim_fast.data.index.formats import MAX_PIXELS, check_size
from ccmim_fast.data.index.tiff_limits import MOST_PAGES, check_chain, check_segments
from ccmim_fast.errors import DataError

# It logs what is odd in a file; what keeps pixels from being right is a reason here.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

_GRAY = (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK)
_BLENDED, _UNBLENDED = (EXTRASAMPLE.ASSOCALPHA,), (EXTRASAMPLE.UNASSALPHA,)
_ALPHA = _BLENDED + _UNBLENDED
# What libtiff, which is built into Pillow, undoes: none, fax, LZW, JPEG, deflate, packed bits, LZMA, Zstandard.
_PILLOWS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946, 34925, 50000)
# Stored pixels -> upright ones, by the tag Orientation.
_TURNS = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def turned(values_HWS: np.ndarray, orientation: int) -> np.ndarray:
    """Return the pixels upright; `orientation` is EXIF's, 1 .. 8."""
    return _TURNS[orientation](values_HWS) if orientation in _TURNS else values_HWS


def read_tiff(data: bytes, channels: int) -> Unread | None:
    """Read the tags of a TIFF: its first image, whose channels are samples of a pixel, planes or pages.

    None: Pillow is to read it. Raises DataError with the reason for one that cannot be used, and from `read` for pixels
    that are cut off, not finite, or marked as no data.
    """
    check_chain(data)
    # The files of a set that OME's XML names are not opened: an image is what its own file holds.
    file = TiffFile(io.BytesIO(data), is_ome=False)
    if not file.series:
        raise DataError("a TIFF without an image")
    series = file.series[0]
    image = _Image(data, series, channels)
    image.check_set()
    if image.is_pillows():
        return None
    image.check()
    others = f", the first of {len(file.series)} images" if len(file.series) > 1 else ""
    pages = f", {image.pages} pages" if image.pages > 1 else ""
    size = image.size[::-1] if image.orientation >= 5 else image.size
    return Unread(size, f"{series.dtype.name}{pages}{others}", image.read, image.orientation)


class _Image:
    """This class knows what the tags say of the first image of a TIFF: `pages` of `samples` a pixel."""

    def __init__(self, data: bytes, series: TiffPageSeries, channels: int):
        self._data, self._series, self._channels = data, series, channels
        self._page = page = series.keyframe
        if series.dtype is None or not {"Y", "X"} <= {*series.axes}:
            raise DataError(f"TIFF pixels of {page.bitspersample} bits that tifffile does not know")
        check_type(series.dtype)
        lengths = dict(zip(series.axes, series.shape))
        self.size = lengths["Y"], lengths["X"]
        self.samples = lengths.get("S", 1)
        self.pages = math.prod(series.shape) // max(1, self.size[0] * self.size[1] * self.samples)
        # tifffile writes an array [H, W, C] that it takes for pages as H pages of W x C, and remembers its shape.
        stack = series.kind == "shaped" and len(series.shape) == 3 and "S" not in series.axes
        self._rows_are_pages = stack and series.shape[2] == channels != self.pages
        if self._rows_are_pages:
            self.size, self.samples, self.pages = series.shape[:2], channels, 1
        check_size(*self.size)
        self.photometric, self._extras = page.photometric, () if self._rows_are_pages else page.extrasamples
        self._colours = self.samples - len(self._extras)
        if self.photometric == PHOTOMETRIC.PALETTE and page.colormap is None:
            raise DataError("a TIFF of a palette without its colours")
        tag = page.tags.get(274)
        self.orientation = tag.value if tag is not None and tag.value in _TURNS else 1

    def is_pillows(self) -> bool:
        """Tell whether Pillow gives these pixels, as gray or RGB."""
        page, alpha, missing = self._page, self._extras, self._missing()
        if self._channels not in (1, 3) or self._series.dtype.kind not in "bu" or page.compression not in _PILLOWS:
            return False
        if self.pages > 1 or self._rows_are_pages or _nodata(page) is not None:
            return False
        kind = self.photometric, self._colours
        gray = kind in ((PHOTOMETRIC.MINISWHITE, 1), (PHOTOMETRIC.MINISBLACK, 1)) and alpha in ((), _UNBLENDED)
        # Pillow undoes what is blended, without rounding.
        rgb = kind == (PHOTOMETRIC.RGB, 3) and len(alpha) < 2 and (alpha != _BLENDED or bool(missing))
        if page.bitspersample == 16:  # Pillow would not invert them, where zero is white
            return (rgb or kind == (PHOTOMETRIC.MINISBLACK, 1)) and not alpha and bool(missing)
        palette = kind == (PHOTOMETRIC.PALETTE, 1) and page.colormap.max() > 255
        cmyk = kind == (PHOTOMETRIC.SEPARATED, 4) and not alpha
        ycbcr = kind == (PHOTOMETRIC.YCBCR, 3) and page.compression == COMPRESSION.JPEG
        return page.bitspersample in (1, 2, 4, 8) and (gray or rgb or palette or cmyk or ycbcr)

    def check_set(self) -> None:
        """Raise DataError if the file is one of an OME-TIFF set and lacks channels that are in the others."""
        text = self._page.description
        files = {*re.findall(r'FileName="([^"]+)"', text)} if "<OME" in text else set()
        size = re.search(r'SizeC="(\d{1,6})"', text)
        if len(files) > 1 and size is not None and int(size[1]) > self._kept():
            words = f"one of {len(files)} files of an OME-TIFF set of {size[1]} channels"
            raise DataError(f"{words}, and holds {self._kept()}: write the channels of an image to one file")

    def check(self) -> None:
        """Raise DataError if these pixels cannot be given, with the reason."""
        kind = self.photometric
        if self.pages * self.samples > MOST_PAGES:
            raise DataError(f"{self.pages} pages of {self.samples} channels")
        if self._series.size > MAX_PIXELS * max(self._channels, 4):
            raise DataError(f"{self._series.size:,} values are more than {MAX_PIXELS * max(self._channels, 4):,}")
        if missing := self._missing():
            raise DataError(f"{missing}, which the package imagecodecs reads: pip install 'ccmim_fast[tiff]'")
        if kind not in (*_GRAY, PHOTOMETRIC.RGB, PHOTOMETRIC.PALETTE) and (
            self._channels in (1, 3) or kind != PHOTOMETRIC.SEPARATED
        ):
            what = f"{getattr(kind, 'name', kind)} pixels of {self._page.bitspersample} bits"
            raise DataError(f"a TIFF of {what}; convert it to gray or RGB")
        if kind == PHOTOMETRIC.MINISWHITE and self._series.dtype.kind not in "bu":
            raise DataError(f"a TIFF of {self._series.dtype.name} in which zero is white; write it with zero as black")
        self._check_channels()

    def _check_channels(self) -> None:
        found = self.samples if self.pages == 1 else self.pages
        if self.pages > 1 and self.samples > 1:
            raise DataError(f"a TIFF of {self.pages} pages of {self.samples} channels; write each page to a file")
        kept = self._kept()
        gray_or_rgb = self.pages == 1 and self._channels in (1, 3) and (kept == 1 or self._is_rgb())
        if kept == self._channels or gray_or_rgb:
            return
        if self.pages > 1:
            total = len(self._page.parent.pages)  # without those of another size or kind, as thumbnails are
            alike = f"{total} pages, {self.pages} of them alike" if total > self.pages else f"{self.pages} pages"
            words = f"a TIFF of {alike}, which are neither {self._channels} channels nor one image"
            raise DataError(f"{words}: data.channels={self.pages} takes pages as channels; else write each to a file")
        raise DataError(not_channels(found, self._channels))

    def _kept(self) -> int:
        """Return how many channels are left of the samples: without alpha, and with a palette's colours."""
        if self.photometric == PHOTOMETRIC.PALETTE:
            return 3
        if self.pages > 1:
            return self.pages
        if self.samples == self._channels or not self._extras:
            return self.samples
        spare = (*_ALPHA, EXTRASAMPLE.UNSPECIFIED) if self.photometric == PHOTOMETRIC.RGB else _ALPHA
        return self._colours if all(extra in spare for extra in self._extras) else self.samples

    def _places_of_alpha(self) -> list[int]:
        """Return the places of alpha among the samples behind the colours."""
        return [place for place, extra in enumerate(self._extras) if extra in _ALPHA]

    def _is_rgb(self) -> bool:
        return self.photometric in (PHOTOMETRIC.RGB, PHOTOMETRIC.PALETTE) and self._kept() == 3

    def _missing(self) -> str:
        """Return what no installed package undoes of the way the samples are stored; empty if nothing."""
        page = self._page
        ways = (
            ("compressed by", TIFF.DECOMPRESSORS, page.compression),
            ("of predictor", TIFF.UNPREDICTORS, page.predictor),
        )
        for how, codecs, key in ways:
            try:
                if (codec := codecs[key]) is not None:
                    codec(b"")
            except (KeyError, ImportError, NotImplementedError):
                return f"a TIFF {how} {getattr(key, 'name', key)}"
            except Exception:  # of any type: these codecs are there, and no bytes are nothing to them
                continue
        packed = page.bitspersample not in (1, 8, 16, 32, 64) and importlib.util.find_spec("imagecodecs") is None
        return f"a TIFF of {page.bitspersample} bits a sample" if packed else ""

    def read(self) -> Stored:
        """Read the pixels; raises DataError as `read_tiff` says."""
        check_segments(self._data, self._series)
        array = self._series.asarray()
        self._check_marked(array)
        values_HWS, full = self._upright(array), full_scale(array.dtype)
        if array.dtype.kind == "u":
            full = float(2**self._page.bitspersample - 1)
        values_HWS, full = self._as_colours(values_HWS, full)
        rgb = self._is_rgb()
        return Stored(np.ascontiguousarray(with_channels(values_HWS, self._channels, rgb)), full)

    def _check_marked(self, array: np.ndarray) -> None:
        """Raise DataError if values are those that mark pixels without data; each page may have a mark of its own."""
        pages = [page for page in self._series.pages if page is not None and not getattr(page, "is_virtual", False)]
        apart = len(pages) == self.pages > 1
        for page, values in zip(pages, array.reshape(self.pages, -1)) if apart else [(self._page, array)]:
            if (nodata := _nodata(page.aspage())) is None:
                continue
            mark = np.float64(nodata)
            if array.dtype.kind == "f":  # it stands there in decimals, and in the pixels as near as their type comes
                with np.errstate(over="ignore"):
                    mark = mark.astype(array.dtype)
            if count := np.count_nonzero(values == mark):
                words = (
                    f"{count:,} of {values.size:,} values are {nodata:g}, by which the file marks pixels without data"
                )
                raise DataError(f"{words}; fill them, or take the mark away")

    def _upright(self, array: np.ndarray) -> np.ndarray:
        if self._rows_are_pages:
            values_HWS = array
        else:
            places = [self._series.axes.index(axis) for axis in "YX"]
            values_HWS = np.moveaxis(array, places, (0, 1)).reshape(*self.size, -1)
        return turned(values_HWS, self.orientation)

    def _as_colours(self, values_HWS: np.ndarray, full: float) -> tuple[np.ndarray, float]:
        """Return gray, RGB or bands in which zero is black, without the alpha that was not asked for."""
        if self.photometric == PHOTOMETRIC.PALETTE:
            colours_S3 = np.asarray(self._page.colormap).T
            # Some writers put 8 bits into the 16 of an entry.
            return colours_S3[values_HWS[..., 0]], 65535.0 if colours_S3.max() > 255 else 255.0
        if self.photometric == PHOTOMETRIC.MINISWHITE:
            is_alpha_S = np.isin(np.arange(values_HWS.shape[2]) - self._colours, self._places_of_alpha())
            white = np.asarray(full).astype(values_HWS.dtype)
            values_HWS = np.where(is_alpha_S, values_HWS, values_HWS ^ white)  # white is all bits: white - values
        kept = self._kept()
        if kept < values_HWS.shape[2]:
            if self._extras[0] == EXTRASAMPLE.ASSOCALPHA:
                values_HWS = _unblended(values_HWS, kept, full)
            values_HWS = values_HWS[..., :kept]
        return values_HWS, full


def _nodata(page: TiffPage) -> float | None:
    """Return GDAL's value for pixels without data; None without one, or for zero, which is black."""
    tag = page.tags.get(42113)
    try:
        value = float(str(tag.value).strip("\0 ")) if tag is not None else 0.0
    except ValueError:
        return None
    return value if value and not math.isnan(value) else None


def _unblended(values_HWS: np.ndarray, colours: int, full: float) -> np.ndarray:
    """Undo the product of the colours with their alpha; what is wholly transparent is black."""
    alpha_HW1 = values_HWS[..., colours : colours + 1].astype(np.float64)
    if values_HWS.dtype.kind != "f":
        alpha_HW1 /= full
    found_HWS = values_HWS[..., :colours] / np.where(alpha_HW1 == 0, np.inf, alpha_HW1)
    return found_HWS if values_HWS.dtype.kind == "f" else np.rint(found_HWS).clip(0, full).astype(values_HWS.dtype)
