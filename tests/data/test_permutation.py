"""The order of the samples: a permutation for every length, key and window; evenly drawn; any position is known."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccmim_fast.data.stream.permutation import BLOCK, epoch_order

WORD = st.integers(0, 2**32 - 1)


def order(seed, epoch, samples, window=0):
    return epoch_order(seed, epoch, samples, np.arange(samples), window)


@settings(deadline=None, max_examples=200)
@given(WORD, WORD, st.integers(1, 3000), st.integers(0, 700))
def test_it_is_a_permutation(seed, epoch, samples, window):
    assert (np.sort(order(seed, epoch, samples, window)) == np.arange(samples)).all()


@settings(deadline=None, max_examples=50)
@given(WORD, st.integers(1, 2**62), st.data(), st.sampled_from([0, 100, 2**20]))
def test_any_position_is_known_without_the_others(seed, samples, data, window):
    positions = np.array(data.draw(st.lists(st.integers(0, samples - 1), min_size=1, max_size=20)))
    found = epoch_order(seed, 1, samples, positions, window)
    assert ((found >= 0) & (found < samples)).all()
    assert len(set(found.tolist())) == len(set(positions.tolist()))
    assert [
        epoch_order(seed, 1, samples, positions[i : i + 1], window)[0] for i in range(len(positions))
    ] == found.tolist()


def test_seed_and_epoch_change_it():
    first = order(3, 1, 5000)
    assert first.dtype == np.int64
    for other in (order(3, 2, 5000), order(4, 1, 5000), np.arange(5000)):
        assert (other == first).mean() < 0.01
    for step in (1, 2, 64, 2500):
        assert abs(np.corrcoef(first, np.roll(first, step))[0, 1]) < 0.06
    assert abs(np.corrcoef(first, np.arange(5000))[0, 1]) < 0.06


@pytest.mark.parametrize("samples", [3, 6, 16, 21])
def test_every_position_is_as_likely_and_so_is_every_pair(samples):
    """Chi-square of 3,000 epochs stays near that of even draws; limits are six standard deviations above its mean."""
    epochs = 3000
    orders = np.stack([order(0, epoch, samples) for epoch in range(epochs)])
    counts = np.stack([np.bincount(column, minlength=samples) for column in orders.T])
    expected = epochs / samples
    freedom = (samples - 1) ** 2
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 6 * np.sqrt(2 * freedom)
    pairs = Counter(map(tuple, orders[:, :2].tolist()))
    possible = samples * (samples - 1)
    expected = epochs / possible
    chi_square = sum((count - expected) ** 2 / expected for count in pairs.values())
    chi_square += (possible - len(pairs)) * expected
    assert chi_square < possible - 1 + 6 * np.sqrt(2 * (possible - 1))


def test_a_window_keeps_neighbours_together():
    samples, window = 10 * BLOCK * 7 + 31, 5 * BLOCK
    found = order(0, 0, samples, window)
    for start in range(0, samples - samples % BLOCK - window, window):
        blocks = Counter((found[start : start + window] // BLOCK).tolist())
        assert len(blocks) == 5
        assert set(blocks.values()) == {BLOCK}
    inside, following = found[:window], found[window : 2 * window]
    assert (inside % BLOCK == following % BLOCK).mean() < 0.1  # each window has a permutation of its own
    assert abs(np.corrcoef(inside // BLOCK, np.arange(window))[0, 1]) < 0.3  # blocks are mixed, not one after the other
    assert (np.diff(found) == 1).mean() < 0.02
    assert not (order(0, 1, samples, window)[:window] == inside).all()
