"""Ranks are killed and launched again: the run ends like one undisturbed (fault 18). One kill here, not a hundred."""

import json

import pytest
import torch


@pytest.fixture
def soak(module):
    return module("soak")


@pytest.mark.slow
def test_killed_ranks_come_back_and_the_run_ends_as_one_left_alone(soak, tmp_path):
    out = tmp_path / "soak"
    assert soak.main(["--kills=1", f"--out={out}"]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    assert (result["kills"], result["same"]) == (1, True)
    assert "| killed | 1 |" in out.with_suffix(".md").read_text()


def test_another_weight_is_noticed(soak):
    state = {"progress": {"step": 1}, "model": {"w": torch.ones(2)}, "maps": torch.zeros(1, 2, 2)}
    assert soak.equal(state, {**state, "model": {"w": torch.ones(2)}})
    assert not soak.equal(state, {**state, "model": {"w": torch.tensor([1.0, 1.0001])}})
    assert not soak.equal(state, {**state, "maps": torch.ones(1, 2, 2)})
    assert not soak.equal(state, {**state, "progress": {"step": 2}})
