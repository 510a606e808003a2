"""Folders of checkpoints to read, damage and write beside."""

from pathlib import Path

import pytest
import torch

from ccmim_fast.checkpoints.io import save


def make_state(value: float) -> dict:
    return {"model": {"weight": torch.full((300,), float(value))}, "step": 7, "config": "seed: 0\n", "value": value}


@pytest.fixture
def state_of():
    """A small state that can be told by `state["value"]`."""
    return make_state


@pytest.fixture
def two(tmp_path) -> Path:
    """A folder with the checkpoints of steps 1 and 2, whose values are 1 and 2."""
    for step in (1, 2):
        save(tmp_path, step, make_state(step), keep=5)
    return tmp_path
