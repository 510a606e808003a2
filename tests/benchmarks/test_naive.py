"""What is off in a step with everything of ours off, beside the model's savings (tests/models/test_savings.py)."""

import pytest
import torch
from tiny import tiny_config

from ccmim_fast.engine import build
from ccmim_fast.engine.dry_run import synthetic_batch
from ccmim_fast.ranks.session import Session


@pytest.fixture
def naive(module):
    return module("naive")


@pytest.mark.parametrize("name", ["naive", "naive-mae", "naive-ccmim"])
def test_everything_is_off(module, naive, name):
    contenders = module("contenders")
    contender = contenders.CONTENDERS[name]
    assert set(contender.without) == set(naive.SAVINGS)
    given = [*contender.settings, *naive.settings_without(contender.without)]
    train = contenders.ours_config(given, "vit_tiny_patch16_224", (2, 32, 32, 3), "fp32").train
    assert (train.kernels, train.attention, train.compile) == ("reference", "sdpa", "off")
    score = contenders.ours_config(given, "vit_tiny_patch16_224", (2, 32, 32, 3), "fp32").score
    assert name == "naive-mae" or score.source == "all"  # no bank


def step_of(naive, savings):
    step = build.build_step(tiny_config(), Session(0, 1, torch.device("cpu")))
    return naive.without(step, savings)


def test_adamw_of_many_kernels_updates_as_the_fused_one(naive):
    fused, plain = step_of(naive, ()), step_of(naive, ["fused_adamw"])
    assert fused.optimizer.defaults["fused"]
    assert not plain.optimizer.defaults["fused"]
    batch = synthetic_batch(fused, 4)
    for _ in range(3):
        found = [step([batch], 1e-3).total.item() for step in (plain, fused)]
        assert found[0] == pytest.approx(found[1], rel=1e-4)
    names = [name for name, _ in fused.model.named_parameters()]
    for name, one, other in zip(names, plain.model.parameters(), fused.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("savings", [["kept_memory"], []])
def test_freed_memory_is_kept_unless_that_is_off(naive, monkeypatch, savings):
    asked = []
    monkeypatch.setattr(build, "keep_freed_memory", lambda: asked.append(True))
    with naive.freed_memory(savings):
        step_of(naive, savings)
    assert asked == [True] * (not savings)
    build.keep_freed_memory()  # as it was
    assert len(asked) == 2 - len(savings)
