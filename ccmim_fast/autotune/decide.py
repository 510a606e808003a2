"""The decision between implementations: those that are wrong are dropped, and of the others the fastest is taken.

They are timed in rounds, in which all take turns, so that a slow moment of the machine hits all.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccmim_fast.autotune.calls import StepCall
from ccmim_fast.autotune.check import differences, failure, failure_of
from ccmim_fast.profile.meter import seconds_of

ROUNDS, LEAST_ROUNDS = 7, 3
SAMPLE = 2e-3  # seconds of a sample, at least: a hundred times what reading the clock and waiting for a GPU take
MARGIN = 0.05  # of the first candidate's time, by which another one's must be less
MOST = 0.75  # of the rounds, which another one must win: on a machine with other work medians alone are no proof


class Question(NamedTuple):
    """This tuple asks which implementation runs."""

    candidates: tuple[str, ...]  # the first runs unless another is faster
    reference: str  # the implementation that is right; need not be a candidate
    factor: float = 2.0  # of the reference's own error, that is allowed; see `check.allowed_error`
    compiled: bool = False  # the run compiles the call, so torch.compile must know what to do with the answer


class Decision(NamedTuple):
    """This tuple answers a question: `chosen`; and why."""

    chosen: str
    milliseconds: dict[str, float]  # of a step's calls (of a loader: of an image), by candidate; empty: not timed
    dropped: dict[str, str]  # by candidate, how it failed or differed from the reference


Questions = Mapping[str, Question]
Calls = Mapping[str, list[StepCall]]  # of a step, by the question that they depend on


def first_that_run(questions: Questions, calls: Calls) -> dict[str, Decision]:
    """Answer each question by its first candidate that raises no error: nothing is compared or timed."""
    decisions = {}
    for name, question in questions.items():
        dropped: dict[str, str] = {}
        decisions[name] = Decision(_chosen(question, {}, dropped, calls[name]), {}, dropped)
    return decisions


def fastest_that_agree(
    questions: Questions, checked: Calls, calls: Calls, device: torch.device, until: float
) -> dict[str, Decision]:
    """Answer each question by the first candidate that agrees with the reference, or by one that is faster.

    `checked` are calls on few images, on which candidates are held against the reference; `calls` are timed, up to the
    moment `until` of `time.perf_counter`: where that is too early, the first is the answer.
    """
    dropped = {name: differences(checked[name], *question[:3]) for name, question in questions.items()}
    samples: dict[tuple[str, str], Callable[[], float]] = {}
    for name, question in questions.items():
        left = _left(question, dropped[name])
        for candidate in left if len(left) > 1 else ():
            if time.perf_counter() > until:
                break
            try:
                passes = [stopwatch(call, candidate, device) for call in calls[name]]
            except Exception as error:  # on many images, though not on few
                dropped[name][candidate] = failure(error)
                continue
            samples[name, candidate] = lambda passes=passes: sum(one() for one in passes)
    times = timed(samples, until)
    decisions = {}
    for name, question in questions.items():
        own = {candidate: times[name, candidate] for candidate in question.candidates if (name, candidate) in times}
        chosen = _chosen(question, own, dropped[name], checked[name])
        decisions[name] = Decision(chosen, milliseconds(own), dropped[name])
    return decisions


def _chosen(
    question: Question, times: Mapping[str, list[float]], dropped: dict[str, str], calls: list[StepCall]
) -> str:
    """Return the winner, or the first where nothing was timed; what cannot make the calls is dropped."""
    while True:
        left = _left(question, dropped)
        own = {candidate: found for candidate, found in times.items() if candidate in left}
        chosen = winner(own) if own else left[0]
        if chosen not in question.candidates or chosen in dropped:
            return chosen
        if not (why := failure_of(calls, chosen, question.compiled)):
            return chosen
        dropped[chosen] = why


def _left(question: Question, dropped: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(c for c in question.candidates if c not in dropped) or (question.reference,)


def stopwatch(call: StepCall, candidate: str, device: torch.device) -> Callable[[], float]:
    """Return a function that returns the seconds of a step's calls, forward and backward, by one implementation."""
    both_passes = partial(call.passes, candidate, Tensor.detach)
    for _ in range(2):  # the first ones compile, and fill caches
        both_passes()
    repeat = max(1, round(SAMPLE / max(seconds_of(both_passes, device), 1e-9)))
    return lambda: seconds_of(both_passes, device, repeat) * call.count


def timed(samples: Mapping[Any, Callable[[], float]], until: float) -> dict[Any, list[float]]:
    """Return what each function returns, called in turns, `LEAST_ROUNDS` to `ROUNDS` times.

    No round begins after the moment `until` of `time.perf_counter`; where it comes too early, nothing is returned.
    """
    rounds: list[dict[Any, float]] = []
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
