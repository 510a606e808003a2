"""This module measures the mean and the standard deviation of the pixels of a set of images."""

# L levels, C channels

from typing import NamedTuple

import numpy as np
from PIL import Image

from ccmim_fast.data.source import Source, usable_count, usable_ids
from ccmim_fast.data.stream.permutation import epoch_order
from ccmim_fast.data.threads import map_ahead, thread_count
from ccmim_fast.errors import DataError


class Stats(NamedTuple):
    """The statistics cover all pixels of so many `images`, on a scale of 0 .. 1."""

    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]
    images: int


def measure_stats(source: Source, images: int, workers: int = 0) -> Stats:
    """Measure `images` images drawn by a fixed key, or all, as far as they decode. Raises DataError: none does."""
    count, threads = min(images, usable_count(source)), thread_count(workers)
    ids = usable_ids(source, epoch_order(0, 0, usable_count(source), np.arange(count))).tolist()

    def histograms(index: int) -> np.ndarray | None:
        """Count the pixels of each level, [C, 256]: exact, whereas sums of uint8 squares would overflow."""
        try:
            image_HWC = source.decode(index)
        except DataError:
            return None
        return np.array([Image.fromarray(image_HWC[..., c]).histogram() for c in range(source.channels)])

    total_CL, used = np.zeros((source.channels, 256), dtype=np.int64), 0
    for counts_CL in map_ahead(histograms, ids, threads, 8 * threads):
        if counts_CL is not None:
            total_CL += counts_CL
            used += 1
    if not used:
        raise DataError(f"none of {count} images can be decoded")
    levels_L = np.arange(256)
    mean_C = total_CL @ levels_L / total_CL.sum(1)
    variance_C = (total_CL * (levels_L - mean_C[:, None]) ** 2).sum(1) / total_CL.sum(1)
    return Stats(tuple((mean_C / 255).tolist()), tuple((np.sqrt(variance_C) / 255).tolist()), used)
