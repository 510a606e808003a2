"""Schedule and parameter groups."""

import math

import pytest
from tiny import tiny_model

from ccmim_fast.optim.optimizer import build_optimizer
from ccmim_fast.optim.update import lr_at, scaled_lr


def test_schedule():
    at = lambda epoch: lr_at(epoch, peak=2.0, floor=0.5, warmup=10, epochs=110)  # noqa: E731
    assert at(0) == 0
    assert at(5) == 1.0
    assert at(10) == 2.0
    assert at(60) == pytest.approx(0.5 + 1.5 / 2)
    assert at(35) == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert at(110) == at(200) == 0.5


def test_schedule_without_warmup_or_decay():
    assert lr_at(0, peak=1.0, floor=0.0, warmup=0, epochs=1) == 1.0
    assert lr_at(1, peak=1.0, floor=0.0, warmup=2, epochs=1) == 0.5


def test_poly_is_a_line_that_warmup_multiplies():
    at = lambda epoch: lr_at(epoch, shape="poly", peak=2.0, floor=0.0, warmup=10, epochs=100)  # noqa: E731
    assert at(0) == 0
    assert at(5) == pytest.approx(2.0 * 0.95 * 0.5)
    assert at(10) == pytest.approx(2.0 * 0.9)
    assert at(75) == pytest.approx(0.5)
    assert at(100) == at(101) == 0


def test_steps_fall_to_a_tenth_at_each_milestone():
    shape = {"peak": 2.0, "floor": 0.0, "warmup": 0.5, "epochs": 12, "milestones": (9 / 12, 11 / 12)}
    at = [lr_at(epoch, shape="steps", **shape) for epoch in (0.25, 0.5, 8.9, 9, 10.9, 11, 12)]
    assert at == pytest.approx([1.0, 2.0, 2.0, 0.2, 0.2, 0.02, 0.02])


def test_linear_scaling():
    assert scaled_lr(1.5e-4, 1024) == pytest.approx(6e-4)


@pytest.mark.parametrize("decay_tokens", [False, True])
def test_no_decay_for_biases_and_norms(decay_tokens):
    """Tokens have none either, but in MAE's and the authors' code."""
    model, _ = tiny_model()
    more = {"decay_tokens": decay_tokens}
    optimizer = build_optimizer("adamw", model, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95), **more)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert decay.keys() == {id(p) for p in trained.values()}
    for name, parameter in trained.items():
        token = name in ("encoder.cls_token", "decoder.mask_token")
        exempt = parameter.ndim == 1 or (token and not decay_tokens)
        assert decay[id(parameter)] == (0.0 if exempt else 0.05), name
