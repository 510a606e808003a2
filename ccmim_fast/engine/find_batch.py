"""The largest micro-batch that fits the GPU's memory, by bisection, and the accumulation that follows from it."""

import dataclasses
from collections.abc import Callable

import torch

from ccmim_fast.config.schema import Config
from ccmim_fast.engine.build import build_step
from ccmim_fast.engine.compile import choose_compile, compile_step, warm_up
from ccmim_fast.errors import MachineError
from ccmim_fast.ranks.session import Session, max_over_ranks

SMALLEST = 2  # the heads' BatchNorm needs two rows


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number in SMALLEST .. limit that fits; 0 if none does. `fits` is True up to some number.

    Doubles until it no longer fits, then bisects: about 2 log2(limit) trials.
    """
    low, high = 0, SMALLEST
    while high < limit and fits(high):
        low, high = high, min(2 * high, limit)
    if high == limit and fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle >= SMALLEST and fits(middle) else (low, middle)
    return low


def with_largest_batch(config: Config, here: Session, fits: Callable[[int], bool] | None = None) -> Config:
    """`config` with the smallest `train.accumulate` whose micro-batch fits every rank; prints what was found.

    Args:
        fits: whether a micro-batch of so many images can be trained on; default: try it.

    Raises:
        MachineError: not even two images fit.
    """
    per_rank = config.train.batch_size // here.world_size
    found = largest(fits or _trial(config, here), per_rank)
    # The smallest over ranks.
    found = -int(max_over_ranks(torch.tensor(-found, device=here.device)))
    if found < SMALLEST:
        raise MachineError(f"train.find_batch: {SMALLEST} images do not fit {here.device}; try train.recompute=true")
    accumulate = next(n for n in range(1, per_rank + 1) if per_rank % n == 0 and per_rank // n <= found)
    if here.is_main:
        print(
            f"largest micro-batch that fits: {found} images{' (all there are)' if found == per_rank else ''}; "
            f"train.accumulate={accumulate}, {per_rank // accumulate} images each",
            flush=True,
        )
    return dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=accumulate))


def _trial(config: Config, here: Session) -> Callable[[int], bool]:
    alone = Session(0, 1, here.device)

    def fits(batch: int) -> bool:
        torch.cuda.empty_cache()
        try:
            step = build_step(config, alone)
            compile_step(step, choose_compile(config.train.compile, here.device), config.train.compile_mode)
            warm_up(step, batch, accumulate=1)
        except torch.cuda.OutOfMemoryError:
            return False
        return True

    return fits
