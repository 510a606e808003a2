"""Learning rate over a run: MAE's warm-up and half cosine, or the schedules of dense predictors."""

import math
from collections.abc import Sequence
from typing import Literal


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """Return the rate by the linear scaling rule: `base_lr` is per 256 images of the optimizer step's batch."""
    return base_lr * batch_size / 256


def lr_at(
    epoch: float,
    *,
    peak: float,
    floor: float,
    warmup: float,
    epochs: float,
    shape: Literal["cosine", "poly", "steps"] = "cosine",
    milestones: Sequence[float] = (),
) -> float:
    """Return the rate at a fractional epoch.

    `cosine` rises from 0 to `peak` over `warmup` epochs, then falls to `floor` at `epochs` by half a cosine. The others
    fall from epoch 0 on, and a linear warm-up from 0 multiplies them, as in mmcv: `poly` linearly to `floor` (power 1),
    `steps` to a tenth at each milestone, a share of the run.
    """
    if shape == "cosine":
        if epoch < warmup:
            return peak * epoch / warmup
        progress = (epoch - warmup) / max(epochs - warmup, 1e-12)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    progress = min(epoch / epochs, 1.0)
    if shape == "poly":
        rate = floor + (peak - floor) * (1 - progress)
    else:
        rate = peak * 0.1 ** sum(progress >= milestone for milestone in milestones)
    return rate * min(epoch / warmup, 1.0) if warmup else rate
