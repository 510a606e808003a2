"""Two processes with gloo give the losses of one on the same global batch, contrast and BatchNorm included."""

import json
import os
import subprocess
import sys

import pytest
from small_run import SETTINGS


def losses(folder, processes, *extra):
    command = [sys.executable, "-m", "ccmim_fast.cli"]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "ccmim_fast.cli"]
    command += ["pretrain", f"--run.dir={folder}", f"--data.root={folder.parent / 'cache'}", *SETTINGS, *extra]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(r["recons"], r["contrast"]) for r in map(json.loads, lines)]


@pytest.mark.slow
@pytest.mark.parametrize("contrast", ["nce", "moco"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one(tmp_path, contrast, accumulate):
    if contrast == "moco" and accumulate == 2:
        pytest.skip("covered by the other three")
    extra = (f"--contrast.loss={contrast}", f"--train.accumulate={accumulate}")
    one = losses(tmp_path / "one", 1, *extra)
    two = losses(tmp_path / "two", 2, *extra)
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=2e-4)
    # The comparison has power: without shared statistics and negatives the losses are others.
    if contrast == "nce" and accumulate == 1:
        apart = losses(tmp_path / "apart", 2, *extra, "--heads.sync_bn=false")
        assert max(abs(a[1] - b[1]) for a, b in zip(one, apart)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_two_processes_with_a_score_bank_equal_one(tmp_path, shards):
    """Ranks that share all maps, and ranks that have their own; three epochs, so that what was kept is used."""
    extra = ("--score.source=bank", f"--score.shards={shards}", "--train.epochs=4", "--mask.strategy=importance")
    one = losses(tmp_path / "one", 1, *extra)
    two = losses(tmp_path / "two", 2, *extra)
    assert len(one) == len(two) == 12
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=2e-3)


@pytest.mark.slow
def test_a_score_bank_goes_on_at_another_world_size(tmp_path):
    """One process, two, one again, stopped within epochs; the maps are in the checkpoints."""
    extra = ("--score.source=bank", "--score.shards=2", "--train.epochs=4", "--mask.strategy=importance")
    whole = losses(tmp_path / "whole", 1, *extra)
    for processes, steps in ((1, 4), (2, 8), (1, 12)):
        legs = losses(tmp_path / "legs", processes, *extra, f"--train.max_steps={steps}", "--resume=auto")
    assert len(legs) == 12
    for a, b in zip(whole, legs):
        assert a == pytest.approx(b, rel=2e-3)


@pytest.mark.slow
def test_divided_weights_go_on_at_another_world_size(tmp_path):
    """Two processes that have divided the weights, one, two again; stopped within epochs, averages and all."""
    extra = ("--train.epochs=4", "--train.parallel=fsdp", "--optim.ema_decay=0.9")
    whole = losses(tmp_path / "whole", 1, *extra)
    for processes, steps in ((2, 4), (1, 8), (2, 12)):
        legs = losses(tmp_path / "legs", processes, *extra, f"--train.max_steps={steps}", "--resume=auto")
    assert len(legs) == 12
    for a, b in zip(whole, legs):
        assert a == pytest.approx(b, rel=2e-3)
