"""This module measures the pixels of a set of images: mean, standard deviation, and what they use of their range."""

# L levels, C channels, P pixels

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from ccmim_fast.data.index.arrays import WHITE, Stored
from ccmim_fast.data.index.index_file import BAD
from ccmim_fast.data.index.indexed import IndexedSource
from ccmim_fast.data.source import Source, usable_count, usable_ids
from ccmim_fast.data.stream.permutation import epoch_order
from ccmim_fast.data.threads import map_ahead, thread_count
from ccmim_fast.errors import DataError

_LOOKED_AT = 16  # images whose range is looked at: the largest of a few is near that of all
_DARK = 1 / 16  # share of white up to which a set has another white: 12 bits in 16
_BEYOND = 2.0  # times white from which on real numbers have another


class Stats(NamedTuple):
    """The statistics cover all pixels of so many `images`; white is 1. `failed` did not decode: numbers, reasons."""

    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]
    images: int
    failed: tuple[tuple[int, str], ...] = ()


class Range(NamedTuple):
    """The range says how far the stored numbers of a set reach, of the number that is white for them."""

    largest: float  # magnitude
    white: float
    max_value: tuple[float, ...]  # a `data.max_value` that fits better, one for all channels or one for each

    def words(self) -> str:
        """Return one line for people."""
        better = ",".join(f"{value:g}" for value in self.max_value)
        better = better if len(self.max_value) == 1 else f"'[{better}]'"
        said = f"pixels reach {self.largest:.6g}, and {self.white:.6g} is white"
        return f"{said}: set --data.max_value={better}; ccmim data stats proposes mean and std with it"


class _Moments(NamedTuple):
    count: int
    mean_C: np.ndarray  # float64
    squares_C: np.ndarray  # float64, sums of squared deviations

    def joined(self, other: "_Moments") -> "_Moments":
        """Return the moments of both sets of pixels (Chan, Golub and LeVeque, 1979)."""
        count, apart_C = self.count + other.count, other.mean_C - self.mean_C
        mean_C = self.mean_C + apart_C * (other.count / count)
        squares_C = self.squares_C + other.squares_C + apart_C**2 * (self.count * other.count / count)
        return _Moments(count, mean_C, squares_C)


def measure_stats(source: Source, images: int, workers: int = 0) -> Stats:
    """Measure `images` images drawn by a fixed key, or all, as far as they decode. Raises DataError: none does."""
    count, threads = min(images, usable_count(source)), thread_count(workers)

    def measure(index: int) -> _Moments | tuple[int, str]:
        try:
            return _moments(source.decode(index))
        except DataError as error:
            return index, str(error)

    total, used, failed = _Moments(0, np.zeros(source.channels), np.zeros(source.channels)), 0, []
    for found in map_ahead(measure, _drawn(source, count), threads, 8 * threads):
        if isinstance(found, _Moments):
            total, used = total.joined(found), used + 1
        else:
            failed.append(found)
    if not used:
        raise DataError(f"none of {count} images can be decoded: {failed[0][1]}")
    std_C = np.sqrt(total.squares_C / total.count)
    return Stats(tuple((total.mean_C / WHITE).tolist()), tuple((std_C / WHITE).tolist()), used, tuple(failed))


def find_range(source: Source) -> Range | None:
    """Look at a few images for a better white; None where they use what they have, or were not stored but made.

    Whole numbers that use a sixteenth of their range or less have one, the next 2^n - 1, and so have those beyond
    `data.max_value`. Real numbers have one if they use as little, or reach beyond twice their white.
    """
    if not isinstance(source, IndexedSource):
        return None
    found, share, white, whole = np.zeros(source.channels), 0.0, 0.0, True
    for index in _drawn(source, min(_LOOKED_AT, usable_count(source))):
        try:
            stored = source.stored(index)
        except DataError:
            continue
        largest_C, limit = _largest(stored), float(stored.limits(source.max_value).max())
        whole = whole and stored.values_HWC.dtype.kind != "f"
        found, share, white = np.maximum(found, largest_C), max(share, largest_C.max() / limit), max(white, limit)
    if not found.any() or _DARK < share <= (1 if whole else _BEYOND):
        return None
    better_C = np.array([_better(value or found.max(), whole) for value in found.tolist()])
    alike = better_C.max() * _DARK < better_C.min()
    return Range(found.max(), white, (better_C.max(),) if alike else tuple(better_C.tolist()))


def pixel_notes(source: Source) -> list[str]:
    """Return what a run tells first of its pixels: pages that are channels or left out, and words of `find_range`."""
    modes = source.index.modes(source.index.status_N != BAD) if isinstance(source, IndexedSource) else {}
    notes = [f"{count} images are {mode}" for mode, count in modes.items() if "," in mode]
    found = find_range(source)
    return notes if found is None else [*notes, found.words()]


def _drawn(source: Source, count: int) -> list[int]:
    return usable_ids(source, epoch_order(0, 0, usable_count(source), np.arange(count))).tolist()


def _moments(image_HWC: np.ndarray) -> _Moments:
    pixels = image_HWC.shape[0] * image_HWC.shape[1]
    if image_HWC.dtype == np.uint8:
        # By the pixels of each level: exact, and three times as fast.
        counts_CL = np.array([Image.fromarray(image_HWC[..., c]).histogram() for c in range(image_HWC.shape[2])])
        levels_L = np.arange(256)
        mean_C = counts_CL @ levels_L / pixels
        return _Moments(pixels, mean_C, (counts_CL * (levels_L - mean_C[:, None]) ** 2).sum(1))
    values_PC = image_HWC.reshape(pixels, -1).astype(np.float64)
    mean_C = values_PC.mean(0)
    return _Moments(pixels, mean_C, ((values_PC - mean_C) ** 2).sum(0))


def _largest(stored: Stored) -> np.ndarray:
    """Return the largest magnitude in each channel, [C] float64; values that are not finite do not count."""
    values_HWC = stored.values_HWC.astype(np.float64)
    return np.abs(np.where(np.isfinite(values_HWC), values_HWC, 0)).max((0, 1))


def _better(largest: float, whole: bool) -> float:
    """Return the next 2^n - 1, or of real numbers the next of two digits."""
    if whole:
        return 2.0 ** math.ceil(math.log2(largest + 1)) - 1
    digit = 10.0 ** (math.floor(math.log10(largest)) - 1)
    return float(f"{math.ceil(largest / digit) * digit:.2g}")
