"""This file tells of a run's health: collapsed representations, losses that jump, images that fail or are late."""

# B batch, E embedding dim

import math
import statistics
from collections import deque
from collections.abc import Callable
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from ccmim_fast.data.build import Loader
from ccmim_fast.data.throughput import measure_stage_times
from ccmim_fast.engine.representation import effective_rank, singular_values
from ccmim_fast.engine.task import Report
from ccmim_fast.runs.metrics import Metrics

_LEAST = 16  # losses before anything is called a spike
_KEPT = 64  # of the last ones it is compared with
WAIT = 0.1  # share of the time waiting for images from which on it is said what they wait for
_IMAGES = 16  # on which that is measured; a moment


def spread(h_BE: Tensor) -> tuple[Tensor, Tensor]:
    """Measure how far the directions of h are spread; float32 scalars on the device.

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
    singular = singular_values((unit_BE - unit_BE.mean(0)).double())
    rank = effective_rank(singular)
    return std, torch.where(singular.sum() > 1e-6 * len(h_BE) ** 0.5, rank, 0).float()


def health_of(h_BE: Tensor, report: Report) -> dict[str, float]:
    """Return `spread` as figures of a record, read from the device; a collapse goes to `report`."""
    std, rank = torch.stack(spread(h_BE)).tolist()
    figures = {"h_std": std, "h_rank": rank}
    if is_collapsed(std, rank, *h_BE.shape):
        words = f"representations collapse: deviation {std:.3f} of 1, {rank:.1f} of {h_BE.shape[1]} dimensions"
        report("collapse", words, **figures)
    return figures


def is_collapsed(std: float, rank: float, rows: int, dim: int) -> bool:
    """Tell if representations are nearly one direction, or use 1 % of the dimensions that so many rows could use."""
    if rows < 3:  # one alone has no deviation, two are on a line
        return False
    return std < 0.05 or rank < 1 + 0.01 * (min(rows - 1, dim) - 1)


class Spikes:
    """This class tells losses that jump from those that wander.

    A spike is more than `limit` standard deviations above the last losses' median, one deviation being 1.4826 times
    their median distance from it (which outliers do not move); with a limit of 0 nothing is.
    """

    def __init__(self, limit: float):
        self._limit, self._last = limit, deque(maxlen=_KEPT)

    def is_spike(self, loss: float) -> bool:
        """Tell if this loss is one, and remember it. What is not finite is no spike, and not remembered."""
        if not math.isfinite(loss):
            return False
        found = False
        if self._limit > 0 and len(self._last) >= _LEAST:
            median = statistics.median(self._last)
            deviation = 1.4826 * statistics.median(abs(last - median) for last in self._last)
            found = loss > median + self._limit * max(deviation, 1e-3 * abs(median))
        self._last.append(loss)
        return found


class DataReport:
    """This class tells which images a rank could not show, and what it waits for.

    Each goes to `note`, and on the first rank, which alone advises, to `metrics`.
    """

    def __init__(
        self, loader: Loader, image_size: tuple[int, int], note: Callable[[str], None], metrics: Metrics | None
    ):
        self._loader, self._image_size, self._note, self._metrics = loader, image_size, note, metrics
        self._told, self._advised = 0, False

    def update(self, step: int, waited: float) -> None:
        """Tell what is new since the last time; `waited` is the share of the time spent waiting for images."""
        for sample, reason in islice(self._loader.bad_samples.reasons.items(), self._told, None):
            self._told += 1
            self._note(f"step {step}: sample {sample} is left out: {reason}")
            if self._metrics is not None:
                self._metrics.write("skipped", step, sample=sample, reason=reason)
        if waited > WAIT and not self._advised and self._metrics is not None:
            self._advised = True
            plan = self._loader.plan
            advice = measure_stage_times(plan, self._image_size, _IMAGES).advice(plan.source)
            self._note(f"step {step}: {waited:.0%} of the time goes by waiting for images; {advice}")

    def close(self) -> None:
        """Sum up."""
        if count := len(self._loader.bad_samples.reasons):
            samples = len(self._loader.plan.source)
            self._note(f"{count} of {samples} samples could not be shown; ccmim data verify looks at all of them")
