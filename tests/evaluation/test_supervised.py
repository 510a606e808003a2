"""Evaluations that train have pretraining's loop: signals, steps that are not finite, bad images, `ccmim runs`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from ccmim_fast import cli
from ccmim_fast.checkpoints import io
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.errors import CheckpointError, DataError, NumericsError, StoppedError
from ccmim_fast.evaluation import supervised
from ccmim_fast.evaluation.encoders import read_weights
from ccmim_fast.evaluation.supervised import Supervised
from ccmim_fast.runs.state import read_state

# Three steps an epoch, nine in all.
SHORT = ["--train.batch_size=20", "--train.epochs=3", "--data.samples=60", "--data.test_samples=20"]
SHORT += ["--optim.warmup_epochs=1", "--run.log_every=1", "--run.test_every=100"]


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def before_step(at, act):
    """Within it `act` is called with the task before step `at`, counted from 1."""
    train = Supervised.train

    def acting(self, batches, step, seen):
        if step + 1 == at:
            act(self)
        return train(self, batches, step, seen)

    return patch.object(Supervised, "train", acting)


def not_finite(at):
    """Within it gradients of the steps `at`, counted from 1 in this process, are NaN."""
    guard, count = supervised.guard, 0

    def spoiled(optimizer, scaler, parts, limit):
        nonlocal count
        count += 1
        if count in at:
            for parameter in parts[0]:
                parameter.grad.fill_(float("nan"))
        return guard(optimizer, scaler, parts, limit)

    return patch.object(supervised, "guard", spoiled)


def weights_at(folder, step):
    return io.load(folder / "checkpoints" / f"step_{step:08d}")["model"]


@pytest.mark.parametrize("name", ["linear", "finetune"])
def test_a_signal_stops_after_its_step_with_all_saved(evaluated, tmp_path, name):
    """Stopped within the second epoch; resumed, it ends as the run that was never stopped, bit for bit."""
    stop = before_step(5, lambda task: os.kill(os.getpid(), signal.SIGTERM))
    with stop, pytest.raises(StoppedError, match=r"stopped by SIGTERM after step 5, all saved") as caught:
        evaluated(name, *SHORT)
    assert caught.value.exit_code == 143
    assert read_state(tmp_path / "out").state == "stopped"
    assert io.newest(tmp_path / "out" / "checkpoints").path.name == "step_00000005"
    stopped = evaluated(name, *SHORT, "--resume=auto")
    whole = evaluated(name, *SHORT, folder="whole")
    assert stopped["figures"] == whole["figures"]
    for mine, other in zip(*(weights_at(tmp_path / folder, 9).values() for folder in ("out", "whole"))):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def test_after_three_bad_steps_a_run_goes_back_past_their_samples(evaluated, tmp_path):
    with not_finite({4, 5, 6}):
        evaluated("linear", *SHORT, "--run.keep=9")
    run = tmp_path / "out"
    assert [record["at"] for record in records(run, "skipped_step")] == [4, 5, 6]
    assert [record["to"] for record in records(run, "went_back")] == [3]
    assert [record["step"] for record in records(run, "train")] == list(range(1, 10))
    third, sixth, ninth = (weights_at(run, step) for step in (3, 6, 9))
    assert all(torch.equal(third[name], sixth[name]) for name in third)
    assert all(bool(value.isfinite().all()) for value in ninth.values())
    assert not all(torch.equal(sixth[name], ninth[name]) for name in sixth)


def test_a_bad_step_changes_neither_weights_nor_statistics(evaluated, tmp_path):
    """The last epoch's steps are all bad: what is saved at the end of it is what was saved before."""
    with not_finite({7, 8}):
        evaluated("linear", *SHORT, "--run.keep=9", "--train.max_steps=8")
    before, after = (weights_at(tmp_path / "out", step) for step in (6, 8))
    assert all(torch.equal(before[name], after[name]) for name in before if "num_batches" not in name)
    assert any(not torch.equal(before[name], value) for name, value in weights_at(tmp_path / "out", 3).items())


def test_without_a_checkpoint_bad_steps_end_the_run(evaluated, tmp_path):
    with not_finite({1, 2, 3}), pytest.raises(NumericsError, match=r"step 3: 3 steps in a row .*; lower optim.base_lr"):
        evaluated("linear", *SHORT)
    state = read_state(tmp_path / "out")
    assert (state.state, state.exit_code) == ("failed", 4)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_that_fails_is_told_and_counted(evaluated, tmp_path, monkeypatch, capsys, workers):
    """It fails in another process, too."""
    decode = ShapesSource.decode

    def broken(self, index):
        if index == 7 and len(self) == 60:
            raise DataError("shape 7: broken")
        return decode(self, index)

    monkeypatch.setattr(ShapesSource, "decode", broken)
    evaluated("finetune", *SHORT, "--data.max_bad=0.1", f"--data.workers={workers}")
    assert [(record["sample"], record["reason"]) for record in records(tmp_path / "out", "skipped")] == [
        (7, "shape 7: broken")
    ]
    said = capsys.readouterr().out
    assert said.count("sample 7 is left out: shape 7: broken") == 1
    assert "1 of 60 samples could not be shown" in said


def test_such_runs_are_listed(evaluated, tmp_path, capsys):
    evaluated("linear", *SHORT)
    capsys.readouterr()
    assert cli.main(["runs", str(tmp_path)]) == 0
    row = next(words for line in capsys.readouterr().out.splitlines() if "out" in (words := line.split()))
    assert row[row.index("out") + 1 :][:2] == ["done", "3.00/3"]
    assert "9" in row


def test_a_run_of_an_evaluation_is_no_encoder(evaluated, tmp_path):
    evaluated("linear", *SHORT)
    with pytest.raises(CheckpointError, match="not a checkpoint of pretraining"):
        read_weights(str(tmp_path / "out"))


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(encoder, cache, shared_settings, tmp_path):
    code = "import os, signal, sys, test_supervised as t; from ccmim_fast import cli\n"
    code += "act = lambda task: task.here.rank == 1 and os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "with t.before_step(5, act):\n    sys.exit(cli.main(sys.argv[1:]))"
    (tmp_path / "main.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "main.py"), "eval", "finetune", str(encoder), *shared_settings, *SHORT]
    command += [f"--data.root={cache}", f"--run.dir={tmp_path / 'out'}"]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert "stopped by a signal to another rank after step 5" in done.stderr, done.stderr[-2000:]
    assert "stopped by SIGTERM after step 5" in done.stderr
    assert io.newest(tmp_path / "out" / "checkpoints").path.name == "step_00000005"
    assert read_state(tmp_path / "out").state == "stopped"
    assert {path.name for path in (tmp_path / "out" / "ranks").glob("rank_?.json")} == {"rank_0.json", "rank_1.json"}
