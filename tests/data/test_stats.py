"""Mean and standard deviation equal NumPy's."""

import numpy as np
import pytest

from ccmim_fast.data.stats import measure_stats
from ccmim_fast.data.stream.permutation import epoch_order
from ccmim_fast.errors import DataError


class Pictures:
    """A source of noise of different sizes; the images in `bad` fail."""

    def __init__(self, samples, channels=3, bad=(), excluded=()):
        self.channels, self.bad, self.excluded_X = channels, set(bad), np.array(sorted(excluded), dtype=np.int64)
        random = np.random.default_rng(samples)
        # Dark and bright ones, so that a subset differs from all.
        self.images = [
            random.integers(0, 20 + 9 * i, (5 + i, 40 - i, channels), dtype=np.uint8) for i in range(samples)
        ]

    def __len__(self):
        return len(self.images)

    def decode(self, index):
        if index in self.bad:
            raise DataError("bad")
        return self.images[index]


def by_numpy(source, ids):
    values_PC = np.concatenate([source.images[i].reshape(-1, source.channels) for i in ids]).astype(np.float64) / 255
    return values_PC.mean(axis=0), values_PC.std(axis=0)


def check(found, wanted):
    # What is left is float64's rounding of the last division.
    assert found.mean_C == pytest.approx(wanted[0], rel=1e-13)
    assert found.std_C == pytest.approx(wanted[1], rel=1e-12)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_all_pixels_of_all_images(channels):
    source = Pictures(20, channels, excluded=[3, 19])
    found = measure_stats(source, 1000, workers=2)
    assert found.images == 18
    check(found, by_numpy(source, [i for i in range(20) if i not in (3, 19)]))


def test_a_subset_is_drawn_by_a_fixed_key():
    source = Pictures(20)
    ids = epoch_order(0, 0, 20, np.arange(6))
    found = measure_stats(source, 6, workers=2)
    assert found == measure_stats(source, 6, workers=1)
    assert found.images == 6
    assert sorted(ids) != list(range(6))
    check(found, by_numpy(source, ids))


def test_what_does_not_decode_is_left_out():
    source = Pictures(10, bad=[0, 4])
    found = measure_stats(source, 10, workers=2)
    assert found.images == 8
    assert sorted(found.failed) == [(0, "bad"), (4, "bad")]
    check(found, by_numpy(source, [i for i in range(10) if i not in (0, 4)]))
    with pytest.raises(DataError, match="none of 3 images can be decoded: bad"):
        measure_stats(Pictures(3, bad=range(3)), 10)


def test_even_pixels_have_no_deviation():
    source = Pictures(2)
    source.images = [np.full((64, 64, 3), 201, dtype=np.uint8)] * 2
    assert measure_stats(source, 2, workers=1).std_C == (0.0, 0.0, 0.0)
