"""Mean and standard deviation of the pixels of a set of images."""

# C channels, P pixels, L levels

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ccmim_fast.data.source import Source, usable_count, usable_ids
from ccmim_fast.data.stream.permutation import epoch_order
from ccmim_fast.data.stream.prefetch import thread_count
from ccmim_fast.errors import DataError

_BLOCK = 2**20  # pixels counted at once: bincount makes int64 of them


class Stats(NamedTuple):
    """mean_C, std_C: of all pixels, on a scale of 0 .. 1. images: on which they were measured."""

    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]
    images: int


def measure_stats(source: Source, images: int, workers: int = 0) -> Stats:
    """Of so many images drawn by a fixed key, or of all; those that do not decode are left out.

    Raises:
        DataError: none decodes.
    """
    count = min(images, usable_count(source))
    ids = usable_ids(source, epoch_order(0, 0, usable_count(source), np.arange(count)))

    levels_L1 = np.arange(256)[:, None]

    def sums(number: int) -> np.ndarray:
        """[3, C]: pixels, their sum, the sum of their squares."""
        try:
            values_PC = source.decode(number).reshape(-1, source.channels)
        except DataError:
            return np.zeros((3, source.channels), dtype=np.int64)
        # Of 256 levels counted once, exactly: squares of uint8 would overflow.
        counts_LC = np.zeros((256, source.channels), dtype=np.int64)
        for start in range(0, len(values_PC), _BLOCK):
            for c, values_P in enumerate(values_PC[start : start + _BLOCK].T):
                counts_LC[:, c] += np.bincount(values_P, minlength=256)
        return np.stack([counts_LC.sum(0), (counts_LC * levels_L1).sum(0), (counts_LC * levels_L1**2).sum(0)])

    total = np.zeros((3, source.channels), dtype=np.int64)
    used = 0
    with ThreadPoolExecutor(thread_count(workers)) as pool:
        for start in range(0, count, 256):
            for found in pool.map(sums, ids[start : start + 256].tolist()):
                total += found
                used += bool(found[0, 0])
    if not used:
        raise DataError(f"none of {count} images can be decoded")
    pixels, first, second = total.astype(np.float64)
    mean_C = first / pixels
    std_C = np.sqrt(np.maximum(0.0, second / pixels - mean_C**2))
    return Stats(tuple((mean_C / 255).tolist()), tuple((std_C / 255).tolist()), used)
