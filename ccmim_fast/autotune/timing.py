"""The timing of implementations: in rounds, in which all take turns, so that a slow moment of the machine hits all."""

import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from ccmim_fast.autotune.calls import StepCall
from ccmim_fast.profile.meter import synchronise

ROUNDS, LEAST_ROUNDS = 7, 3
SAMPLE = 2e-3  # seconds of a sample, at least: a hundred times what reading the clock and waiting for a GPU take
MARGIN = 0.05  # of the first candidate's time, by which another one's must be less
MOST = 0.75  # of the rounds, which another one must win: on a machine with other work medians alone are no proof

Key = TypeVar("Key", bound=Hashable)


def stopwatch(call: StepCall, candidate: str, device: torch.device) -> Callable[[], float]:
    """Return a function that returns the seconds of a step's calls, forward and backward, by one implementation."""

    def seconds(repeat: int) -> float:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(repeat):
            call.passes(candidate, Tensor.detach)
        synchronise(device)
        return (time.perf_counter() - start) / repeat * call.count

    for _ in range(2):  # the first passes compile, and fill caches
        call.passes(candidate, Tensor.detach)
    repeat = max(1, round(SAMPLE * call.count / max(seconds(1), 1e-9)))
    return partial(seconds, repeat)


def timed(samples: Mapping[Key, Callable[[], float]], until: float) -> dict[Key, list[float]]:
    """Return what each function returns, called in turns, `LEAST_ROUNDS` to `ROUNDS` times.

    No round begins after the moment `until` of `time.perf_counter`; where it comes too early, nothing is returned.
    """
    rounds: list[dict[Key, float]] = []
    while len(rounds) < ROUNDS and time.perf_counter() < until:
        rounds.append({key: sample() for key, sample in samples.items()})
    return {key: [one[key] for one in rounds] for key in samples} if len(rounds) >= LEAST_ROUNDS else {}


def winner(times: Mapping[str, list[float]]) -> str:
    """Return the first candidate, or the fastest one where it is faster by `MARGIN` and in `MOST` of the rounds."""
    first, best = next(iter(times)), min(times, key=lambda candidate: median(times[candidate]))
    won = sum(a < b for a, b in zip(times[best], times[first], strict=True))
    faster = median(times[best]) < (1 - MARGIN) * median(times[first])
    return best if faster and won >= MOST * len(times[first]) else first


def milliseconds(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median of each candidate's times, which are in seconds."""
    return {candidate: round(1e3 * median(found), 4) for candidate, found in times.items()}
