"""The decision between implementations: those that are wrong are dropped, and of the others the fastest is taken."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from ccmim_fast.autotune.calls import StepCall
from ccmim_fast.autotune.check import differences, failure, failure_of
from ccmim_fast.autotune.timing import milliseconds, stopwatch, timed, winner


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
        for candidate in question.candidates:
            if not (why := failure_of(calls[name], candidate, question.compiled)):
                break
            dropped[candidate] = why
        decisions[name] = Decision(_left(question, dropped)[0], {}, dropped)
    return decisions


def fastest_that_agree(
    questions: Questions, checked: Calls, calls: Calls, device: torch.device, until: float
) -> dict[str, Decision]:
    """Answer each question by the first candidate that agrees with the reference, or by one that is faster.

    Args:
        checked: calls on few images, on which candidates are held against the reference.
        calls: calls that are timed.
        until: moment of `time.perf_counter` at which timing ends; where that is too early, the first is the answer.
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
    """Return the winner, or the first where nothing was timed; what cannot be compiled and must be is dropped."""
    while True:
        left = _left(question, dropped)
        own = {candidate: found for candidate, found in times.items() if candidate in left}
        chosen = winner(own) if own else left[0]
        if not question.compiled or chosen not in question.candidates or chosen in dropped:
            return chosen
        if not (why := failure_of(calls, chosen, compiled=True)):
            return chosen
        dropped[chosen] = why


def _left(question: Question, dropped: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(c for c in question.candidates if c not in dropped) or (question.reference,)
