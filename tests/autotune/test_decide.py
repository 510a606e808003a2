"""Candidates that are wrong are dropped, each with a line; of the others the fastest is taken, by a margin."""

import time

import pytest
import torch

from ccmim_fast.autotune import decide
from ccmim_fast.autotune.calls import calls_of
from ccmim_fast.autotune.decide import (
    LEAST_ROUNDS,
    ROUNDS,
    Question,
    fastest_that_agree,
    first_that_run,
    timed,
    winner,
)
from ccmim_kernels.dispatch import choosable

CPU = torch.device("cpu")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2.1 * grad


def raises(x):
    raise NotImplementedError("no kernel\n for this")


DOUBLINGS = {
    "reference": lambda x: 2 * x,
    "right": lambda x: x + x,
    "wrong": lambda x: 2.1 * x,
    "not a number": lambda x: 2 * x + torch.where(x == x.max(), torch.nan, 0),
    "wrong gradient": WrongGradient.apply,
    "no gradient": lambda x: 2 * x.detach(),
    "raises": raises,
    "other dtype": lambda x: (2 * x).double(),
    "one id off": lambda x: 2 * x,
}


@choosable("double", by="how")
def double(x, *, how):
    """Return 2 x, and the order of its values."""
    order = x.detach().argsort()
    return DOUBLINGS[how](x), order.roll(1) if how == "one id off" else order


def asked(candidates, x=None):
    x = torch.randn(64, requires_grad=True) if x is None else x
    return {"double": Question(tuple(candidates), "reference")}, calls_of(lambda: double(x, how="reference"), CPU)


@pytest.fixture
def times(monkeypatch):
    """Times of each round by candidate, in place of measured ones."""
    given = {}
    monkeypatch.setattr(decide, "timed", lambda samples, until: {key: given.get(key[1], [1.0] * 4) for key in samples})
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_wrong_is_dropped_with_a_line(times, dtype):
    x = torch.randn(64).to(dtype).requires_grad_()
    questions, calls = asked(DOUBLINGS, x)
    decision = fastest_that_agree(questions, calls, calls, CPU, time.perf_counter() + 60)["double"]
    assert decision.milliseconds.keys() == {"reference", "right"}
    assert decision.dropped.keys() == DOUBLINGS.keys() - {"reference", "right"}
    assert decision.dropped["raises"] == "NotImplementedError: no kernel for this"
    assert decision.dropped["one id off"] == "result 1 differs from the reference's"
    assert decision.dropped["wrong gradient"].startswith("result 2 is wrong by ")
    assert all("\n" not in why for why in decision.dropped.values())


def test_the_fastest_is_taken_the_first_in_doubt(times):
    questions, calls = asked(["reference", "right"])

    def taken():
        return fastest_that_agree(questions, calls, calls, CPU, time.perf_counter() + 60)["double"].chosen

    assert taken() == "reference"
    times["right"] = [0.96] * 4  # within the margin
    assert taken() == "reference"
    times["right"] = [0.9] * 4
    assert taken() == "right"
    times["wrong"] = [0.1] * 4
    questions, calls = asked(["wrong", "reference"])
    assert taken() == "reference"


def test_the_reference_runs_where_no_candidate_is_right(times):
    questions, calls = asked(["wrong", "raises"])
    assert fastest_that_agree(questions, calls, calls, CPU, time.perf_counter() + 60)["double"].chosen == "reference"
    questions, calls = asked(["raises"])
    assert first_that_run(questions, calls)["double"].chosen == "reference"


def test_unmeasured_it_is_the_first_that_runs():
    questions, calls = asked(["raises", "wrong", "right"])
    decision = first_that_run(questions, calls)["double"]
    assert decision == ("wrong", {}, {"raises": "NotImplementedError: no kernel for this"})


def test_what_torch_compile_cannot_trace_is_dropped_where_the_run_compiles(times, monkeypatch):
    def breaks(x):
        torch._dynamo.graph_break()
        return x + x

    monkeypatch.setitem(DOUBLINGS, "right", breaks)
    questions, calls = asked(["right", "reference"])
    assert first_that_run(questions, calls)["double"].chosen == "right"
    questions["double"] = questions["double"]._replace(compiled=True)
    for decision in (
        first_that_run(questions, calls)["double"],
        fastest_that_agree(questions, calls, calls, CPU, time.perf_counter() + 60)["double"],
    ):
        assert decision.chosen == "reference"
        assert list(decision.dropped) == ["right"]


def test_a_candidate_that_fails_on_many_images_alone(times, monkeypatch):
    monkeypatch.setitem(DOUBLINGS, "right", lambda x: x + x if len(x) < 100 else raises(x))
    questions, few = asked(["right", "reference"])
    _, many = asked(["right", "reference"], torch.randn(200, requires_grad=True))
    decision = fastest_that_agree(questions, few, many, CPU, time.perf_counter() + 60)["double"]
    assert (decision.chosen, list(decision.dropped)) == ("reference", ["right"])


def test_rounds_take_turns_and_end_in_time():
    order = []
    samples = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    assert timed(samples, time.perf_counter() + 60) == {"a": [1.0] * ROUNDS, "b": [1.0] * ROUNDS}
    assert order == ["a", "b"] * ROUNDS
    assert timed(samples, time.perf_counter()) == {}
    slow = {"a": lambda: time.sleep(0.2) or 1.0}
    assert timed(slow, time.perf_counter() + 0.1 * LEAST_ROUNDS) == {}


def test_a_slow_candidate_loses_by_the_clock(monkeypatch):
    monkeypatch.setitem(DOUBLINGS, "right", lambda x: time.sleep(0.02) or x + x)
    questions, calls = asked(["right", "reference"])
    decision = fastest_that_agree(questions, calls, calls, CPU, time.perf_counter() + 60)["double"]
    assert decision.chosen == "reference"
    assert decision.milliseconds["right"] >= 20


def test_the_winner_is_faster_by_the_median_and_in_most_rounds():
    assert winner({"a": [1.0, 1.0, 9.0], "b": [1.1, 1.1, 1.1]}) == "a"
    assert winner({"a": [1.0] * 4, "b": [0.5, 0.5, 0.5, 9.0]}) == "b"
    assert winner({"a": [1.0] * 5, "b": [0.5, 0.5, 0.5, 9.0, 9.0]}) == "a"


def test_calls_are_those_of_the_step():
    """One for each layout, counted; what a call calls in turn is not one; state of gradients and autocast is kept."""

    @choosable("outer", by="how")
    def outer(x, *, how):
        return double(x, how=how)

    x, other = torch.randn(4, requires_grad=True), torch.randn(4, 4).t()

    def step():
        double(x, how="reference")
        double(x, how="reference")
        double(other, how="reference")
        outer(x, how="reference")
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            double(x, how="reference")

    found = calls_of(step, CPU)
    assert [(c.count, c.gradient, c.autocast) for c in found["double"]] == [
        (2, True, None),
        (1, True, None),
        (1, False, torch.bfloat16),
    ]
    assert found["double"][0].call.arguments[0].requires_grad
    assert not found["double"][2].call.arguments[0].requires_grad
    assert found["double"][1].call.arguments[0].stride() == other.stride()
    assert len(found["outer"]) == 1
