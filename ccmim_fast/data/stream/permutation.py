"""The order of the samples is a permutation keyed by (seed, epoch); each position is computed without the others."""

# P positions asked for

import numpy as np
import torch

from ccmim_kernels.philox import STREAM_ORDER, philox_4x32, stream_key

# Neighbouring samples that stay together where `window` is set: 8 MB of ImageNet's files, a row group of most tables.
BLOCK = 100
_ROUNDS = 10  # of the Feistel network; an even number, so that both halves end where they began
_LEAST_BITS = 4  # with halves of a single bit there are too few functions to draw permutations evenly
_POWERS_OF_TWO = 2 ** np.arange(63)  # as many are smaller than a length n >= 1 as n - 1 has bits
_GOLDEN = 0x9E3779B97F4A7C15  # odd constants of splitmix64 (Steele, Lea and Flood 2014)
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def epoch_order(
    seed: int, epoch: int, samples: int, positions_P: np.ndarray, window: int = 0, partition: int = 0
) -> np.ndarray:
    """Return the samples at some positions of an epoch's order, [P] int64 in 0 .. samples - 1, in O(P) time and memory.

    Over all positions it is a permutation. With a window, blocks of `BLOCK` neighbouring samples are permuted, and then
    all samples of each `window` successive positions: a reader stays in one region for a while.

    Each seed, epoch and partition, 0 .. 2**32 - 1, has its own order. There are 1 .. 2**62 samples, and a position is
    an int64 below. A window has at least `BLOCK` samples; 0: all.
    """
    key = (seed, epoch, partition)
    if not window:
        return _permute(key, 0, np.full(len(positions_P), samples), positions_P)
    window = max(BLOCK, window // BLOCK * BLOCK)
    index_P, inside_P = np.divmod(positions_P, window)
    lengths_P = np.minimum(window, samples - index_P * window)
    mixed_P = index_P * window + _permute(key, 1 + index_P, lengths_P, inside_P)
    blocks = samples // BLOCK  # the remaining samples, fewer than a block, stay at the end
    block_P, rest_P = np.divmod(mixed_P, BLOCK)
    whole_P = block_P < blocks
    moved_P = _permute(key, 0, np.full(len(positions_P), max(blocks, 1)), np.where(whole_P, block_P, 0))
    return np.where(whole_P, moved_P * BLOCK + rest_P, mixed_P)


def _permute(
    key: tuple[int, int, int], which: int | np.ndarray, lengths_P: np.ndarray, positions_P: np.ndarray
) -> np.ndarray:
    """Map positions by the permutation of 0 .. lengths - 1 that (seed, epoch, partition) and `which` select.

    A Feistel network permutes the numbers of as few bits as hold `lengths - 1`; a result outside is permuted again
    until it falls inside (cycle walking; less than twice on average).
    """
    bits_P = np.maximum(_LEAST_BITS, np.searchsorted(_POWERS_OF_TWO, lengths_P)).astype(np.uint64)
    keys_RP = _round_keys(*key, np.broadcast_to(np.asarray(which), positions_P.shape))
    found_P = positions_P.astype(np.uint64)
    outside = np.arange(len(positions_P))
    while len(outside):
        found_P[outside] = _feistel(found_P[outside], bits_P[outside], keys_RP[:, outside])
        outside = outside[found_P[outside] >= lengths_P[outside].astype(np.uint64)]
    return found_P.astype(np.int64)


def _feistel(x_P: np.ndarray, bits_P: np.ndarray, keys_RP: np.ndarray) -> np.ndarray:
    """Permute the numbers below 2**bits. The halves differ in length by one bit where `bits` is odd."""
    low_P = bits_P >> np.uint64(1)
    high_P = bits_P - low_P
    low_ones_P, high_ones_P = ((np.uint64(1) << half_P) - np.uint64(1) for half_P in (low_P, high_P))
    left_P, right_P = x_P >> low_P, x_P & low_ones_P
    for number, key_P in enumerate(keys_RP):
        # `left` has `high` bits and `right` has `low` bits before an even round, the other way round before an odd one.
        ones_P = high_ones_P if number % 2 == 0 else low_ones_P
        left_P, right_P = right_P, left_P ^ (_mix(right_P ^ key_P) & ones_P)
    return (left_P << low_P) | right_P


def _mix(x_P: np.ndarray) -> np.ndarray:
    """Apply splitmix64's finaliser: every bit of the result depends on every bit of x."""
    x_P = (x_P ^ (x_P >> np.uint64(30))) * np.uint64(_MIX[0])
    x_P = (x_P ^ (x_P >> np.uint64(27))) * np.uint64(_MIX[1])
    return x_P ^ (x_P >> np.uint64(31))


def _round_keys(seed: int, epoch: int, partition: int, which_P: np.ndarray) -> np.ndarray:
    """Return the keys of the rounds, [rounds, P] uint64."""
    counters = (torch.tensor(c) for c in (epoch, partition, 0, 0))
    first, second, _, _ = (word.item() for word in philox_4x32(stream_key(seed, STREAM_ORDER), *counters))
    start_P = np.uint64(first << 32 | second) + which_P.astype(np.uint64) * np.uint64(_MIX[1])
    steps_R1 = np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None] * np.uint64(_GOLDEN)
    return _mix(_mix(start_P) + steps_R1)
