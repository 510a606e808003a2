"""A pretraining run that is measured on its way: before the first step and after each quarter of its epochs."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from ccmim_fast.config.schema import Config
from ccmim_fast.engine.pretraining import Pretraining, fit
from ccmim_fast.report.curves import read_metrics

QUARTERS = 4


def fit_and_measure(
    config: Config, measure: Callable[[int, Pretraining], dict[str, Any]]
) -> tuple[list[tuple[int, float, dict[str, Any]]], float]:
    """Pretrain, and call `measure(epoch, trainer)` at each milestone.

    Returns (epoch, seconds of training so far, figures) of each milestone, from epoch 0 on, where measuring takes none
    of the seconds; and the median of the images per second.
    """
    wanted = {round(config.train.epochs * quarter / QUARTERS) for quarter in range(QUARTERS + 1)}
    found = []
    started, measuring = time.perf_counter(), 0.0

    def after_epoch(epoch: int, trainer: Pretraining) -> None:
        nonlocal measuring
        if epoch in wanted:
            begun = time.perf_counter()
            found.append((epoch, begun - started - measuring, measure(epoch, trainer)))
            measuring += time.perf_counter() - begun

    folder = fit(config, after_epoch=after_epoch)
    rates = [line["images_per_second"] for line in read_metrics(folder / "metrics.jsonl")]
    # The first line counts FLOPs as it goes, which is slow.
    return found, statistics.median(rates[1:] or rates)
