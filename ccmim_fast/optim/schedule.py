"""Learning rate over a run: linear warm-up, then half a cosine (MAE)."""

import math


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """Linear scaling rule: `base_lr` is per 256 images of the optimizer step's batch."""
    return base_lr * batch_size / 256


def lr_at(epoch: float, *, peak: float, floor: float, warmup: float, epochs: float) -> float:
    """The rate at a fractional epoch: from 0 to `peak` over `warmup` epochs, then down to `floor` at `epochs`."""
    if epoch < warmup:
        return peak * epoch / warmup
    progress = (epoch - warmup) / max(epochs - warmup, 1e-12)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
