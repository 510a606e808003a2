"""In which order the samples come, and which rank takes which: functions of integers, nothing to restore."""

# N samples, A micro-batches per optimizer step, W ranks, B images of one micro-batch of one rank

import numpy as np
import torch

from ccmim_fast.errors import ConfigError, DataError
from ccmim_kernels.philox import STREAM_ORDER, philox_4x32, stream_key


def epoch_order(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The sample ids of one epoch, [N] int64: a permutation keyed by (seed, epoch), ties by id.

    Args:
        seed, epoch: 0 .. 2**32 - 1.
        samples: N.
    """
    ids_N = torch.arange(samples)
    key = stream_key(seed, STREAM_ORDER)
    high_N, low_N, _, _ = philox_4x32(key, ids_N & 0xFFFFFFFF, ids_N >> 32, torch.tensor(0), torch.tensor(epoch))
    keys_N = (high_N.numpy().astype(np.uint64) << np.uint64(32)) | low_N.numpy().astype(np.uint64)
    return np.argsort(keys_N, kind="stable").astype(np.int64)


def rank_batches(
    order_N: np.ndarray, step: int, global_batch: int, accumulate: int, rank: int, world_size: int
) -> np.ndarray:
    """The ids one rank takes in one optimizer step, [A, B] int64: a row per micro-batch.

    Step s takes order[s * G : (s + 1) * G], each micro-batch a contiguous A-th of it, each rank a contiguous W-th of
    that, so what a micro-batch holds does not depend on the number of ranks.

    Args:
        order_N: see `epoch_order`.
        step: s, within the epoch.
        global_batch: G, images per optimizer step over all ranks; a multiple of A * W.
    """
    step_ids = order_N[step * global_batch : (step + 1) * global_batch]
    return step_ids.reshape(accumulate, world_size, -1)[:, rank]


def check_batch(samples: int, global_batch: int, accumulate: int, world_size: int) -> None:
    """Raise unless an epoch has a step and each rank an equal share of it.

    Raises:
        ConfigError: `global_batch` is no multiple of `accumulate` * `world_size`.
        DataError: there are fewer samples than one step takes.
    """
    share = accumulate * world_size
    if global_batch < 1 or global_batch % share:
        nearest = max(1, round(global_batch / share)) * share
        raise ConfigError(
            f"train.batch_size={global_batch} must be a multiple of {share} "
            f"(train.accumulate={accumulate} x {world_size} ranks); the nearest is {nearest}"
        )
    if samples < global_batch:
        largest = samples // share * share
        advice = f"set train.batch_size={largest} or less" if largest else f"at least {share} images are needed"
        raise DataError(f"{samples} images are fewer than train.batch_size={global_batch}; {advice}")
