"""A training step enters few files of the project: whoever reads the step reads these."""

import sys
from pathlib import Path

import pytest
import torch
from small_run import SETTINGS

from ccmim_fast.config.load import load_config
from ccmim_fast.engine.loop import Loop
from ccmim_fast.engine.pretraining import fit

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "ccmim_fast", ROOT / "kernels")
MOST = {"bank": 22, "mae": 16}
RUNS = {"bank": [], "mae": ["--mask.strategy=random", "--contrast.loss=none"]}
TRACED = 3  # the number of the traced step; those before it open files and make the optimizer's state


@pytest.mark.parametrize("run", RUNS)
def test_files_entered_by_a_step(run, tmp_path, monkeypatch):
    """The loop's step, backward pass included, as `ccmim pretrain` takes it, traced by `sys.settrace`."""
    entered, step = set(), Loop._train

    def trace(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if any(path.is_relative_to(package) for package in PACKAGES):
            entered.add(str(path.relative_to(ROOT)))

    def traced(loop, batches):
        if loop.step + 1 != TRACED:
            return step(loop, batches)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with torch.autograd.set_multithreading_enabled(False):  # the backward pass runs in this thread
                return step(loop, batches)
        finally:
            sys.settrace(before)

    monkeypatch.setattr(Loop, "_train", traced)
    where = [f"--run.dir={tmp_path / 'run'}", f"--data.root={tmp_path / 'made'}", f"--train.max_steps={TRACED}"]
    fit(load_config([*SETTINGS, *RUNS[run], *where], "ccmim pretrain"))
    assert {"ccmim_fast/engine/step.py", "ccmim_fast/models/tokens.py"} <= entered
    assert len(entered) <= MOST[run], "\n" + "\n".join(sorted(entered))
