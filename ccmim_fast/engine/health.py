"""Figures of a run's health that a loss does not show: collapsed representations, losses that jump."""

# B batch, E embedding dim

import statistics
from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST = 16  # losses before anything is called a spike
_KEPT = 64  # of the last ones it is compared with


def spread(h_BE: Tensor) -> tuple[Tensor, Tensor]:
    """How far the directions of h are spread; float32 scalars on the device.

    Args:
        h_BE: [B, E], the [CLS] projections of one micro-batch.

    Returns:
        std: standard deviation of the normalised rows over the batch, mean over dimensions, times sqrt(E): 1 where they
            are spread evenly over the sphere, 0 where all are one (Chen and He 2021, SimSiam).
        rank: exp of the entropy of the centred rows' normalised singular values: the number of dimensions that are used
            evenly, 1 .. min(B - 1, E) (Garrido et al. 2023, RankMe). 0 where all rows are one.
    """
    unit_BE = F.normalize(h_BE.float(), dim=1)
    std = unit_BE.std(0).mean() * unit_BE.shape[1] ** 0.5
    # In float64: a Gram matrix squares, so float32 would leave singular values of 3e-4 where there are none.
    centred_BE = (unit_BE - unit_BE.mean(0)).double()
    # Eigenvalues of the smaller Gram matrix are the squares of the singular values: much cheaper than these.
    gram = centred_BE.T @ centred_BE if len(h_BE) > h_BE.shape[1] else centred_BE @ centred_BE.T
    # What is not finite, of which std tells, has no eigenvalues.
    singular = torch.linalg.eigvalsh(gram.nan_to_num()).clamp_min(0).sqrt()
    share = singular / singular.sum()
    rank = torch.exp(torch.special.entr(share).sum())
    return std, torch.where(singular.sum() > 1e-6 * len(h_BE) ** 0.5, rank, 0).float()


def health_of(h_BE: Tensor) -> tuple[float, float, str]:
    """`spread`, read from the device, and a line for whoever is watching if that is a collapse, else none."""
    std, rank = torch.stack(spread(h_BE)).tolist()
    words = f"representations collapse: deviation {std:.3f} of 1, {rank:.1f} of {h_BE.shape[1]} dimensions"
    return std, rank, words if is_collapsed(std, rank, *h_BE.shape) else ""


def is_collapsed(std: float, rank: float, rows: int, dim: int) -> bool:
    """Whether representations are nearly one direction, or use 1 % of the dimensions that so many rows could use."""
    if rows < 3:  # one alone has no deviation, two are on a line
        return False
    return std < 0.05 or rank < 1 + 0.01 * (min(rows - 1, dim) - 1)


class Spikes:
    """Tells losses that jump from those that wander.

    Args:
        limit: how many standard deviations above the last losses' median is a spike, one deviation being 1.4826 times
            their median distance from it (which outliers do not move); 0: nothing is.
    """

    def __init__(self, limit: float):
        self._limit, self._last = limit, deque(maxlen=_KEPT)

    def is_spike(self, loss: float) -> bool:
        """Whether this loss is one, and remember it. What is not finite is no spike, and not remembered."""
        if loss != loss or abs(loss) == float("inf"):
            return False
        found = self._limit > 0 and len(self._last) >= _LEAST and loss > self._threshold()
        self._last.append(loss)
        return found

    def _threshold(self) -> float:
        median = statistics.median(self._last)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self._last)
        return median + self._limit * max(deviation, 1e-3 * abs(median))
