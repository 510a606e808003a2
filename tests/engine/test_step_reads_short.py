"""A training step enters few files of the project: whoever reads the step reads these."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from ccmim_fast.engine.build import build_step
from ccmim_fast.engine.dry_run import synthetic_batch
from ccmim_fast.ranks.session import Session

ROOT = Path(__file__).parents[2]
MOST = {"bank": 22, "mae": 16}
RUNS = {
    "bank": {"score": {"source": "bank"}},
    "mae": {"mask": {"strategy": "random"}, "contrast": {"loss": "none"}},
}


@pytest.mark.parametrize("run", RUNS)
def test_files_entered_by_a_step(run):
    config = tiny_config(train={"device": "cpu", "precision": "fp32"}, **RUNS[run])
    step = build_step(config, Session(0, 1, torch.device("cpu")))
    batch = synthetic_batch(step, 4)
    entered = set()

    def trace(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "ccmim_fast") or path.is_relative_to(ROOT / "kernels"):
            entered.add(str(path.relative_to(ROOT)))

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            step([batch], 1e-3)
    finally:
        sys.settrace(before)
    assert "ccmim_fast/engine/step.py" in entered
    assert len(entered) <= MOST[run], "\n" + "\n".join(sorted(entered))
