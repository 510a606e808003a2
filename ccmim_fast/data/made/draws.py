"""The random numbers of made images: functions of (seed, sample id) alone."""

# N samples, K classes, D draws

import numpy as np
import torch

from ccmim_kernels.philox import STREAM_SHAPES, keyed_uniform

# What in `philox` is the epoch, here keeps the uses of one sample apart.
PURPOSE_LABEL, PURPOSE_PARAMETERS, PURPOSE_NOISE = range(3)


def sample_uniforms(seed: int, index: int, count: int, purpose: int) -> np.ndarray:
    """[D] float64 in (0, 1), D = `count`, a function of (seed, index, purpose)."""
    return keyed_uniform(seed, purpose, torch.tensor([index]), count, STREAM_SHAPES)[0].numpy()


def balanced_labels(seed: int, samples: int, classes: int) -> np.ndarray:
    """[N] int64 in 0 .. K - 1: each K consecutive samples hold every class once, in an order drawn for them.

    So the classes are balanced, a label depends on (seed, id, K) alone, and no stride through the ids misses a class.
    """
    blocks = -(-samples // classes)
    u_N1 = keyed_uniform(seed, PURPOSE_LABEL, torch.arange(blocks * classes), 1, STREAM_SHAPES).numpy()
    ranks = u_N1.reshape(blocks, classes).argsort(axis=1)
    return ranks.reshape(-1)[:samples].astype(np.int64)
