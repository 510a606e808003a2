"""Two processes with gloo give the losses of one on the same global batch, contrast and BatchNorm included."""

import json

import pytest
from ranks_launcher import needs_mean, run_ranks
from small_run import SETTINGS


def losses(folder, processes, *extra):
    settings = [f"--run.dir={folder}", f"--data.root={folder.parent / 'cache'}", *SETTINGS, *extra]
    run_ranks(processes, "-m", "ccmim_fast.cli", "pretrain", *settings)
    return [(r["recons"], r["contrast"]) for r in records(folder, "train")]


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize(("contrast", "accumulate"), [("nce", 1), ("moco", 2)])
def test_two_processes_equal_one(tmp_path, contrast, accumulate):
    extra = (f"--contrast.loss={contrast}", f"--train.accumulate={accumulate}")
    extra += ("--mask.hints=0.2", "--mask.importance=[0.5,1]", "--score.temperature=[4,1]")
    one = losses(tmp_path / "one", 1, *extra)
    two = losses(tmp_path / "two", 2, *extra)
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=2e-4)
    # The comparison has power: without shared statistics and negatives the losses are others.
    if contrast == "nce":
        apart = losses(tmp_path / "apart", 2, *extra, "--heads.sync_bn=false")
        assert max(abs(a[1] - b[1]) for a, b in zip(one, apart)) > 1e-3


@pytest.mark.slow
@needs_mean
def test_ranks_look_at_the_features_together(tmp_path):
    """Of whole weights and of divided ones, each rank at its share: the figures of one process."""
    found = {}
    for name, processes, parallel in (("one", 1, "ddp"), ("two", 2, "ddp"), ("divided", 2, "fsdp")):
        losses(tmp_path / name, processes, f"--train.parallel={parallel}", "--run.save_every=1", "--train.max_steps=3")
        found[name] = records(tmp_path / name, "features")
    for name in ("two", "divided"):
        for one, two in zip(found["one"], found[name], strict=True):
            assert one.keys() == two.keys()
            for key in one.keys() - {"kind"}:
                assert two[key] == pytest.approx(one[key], rel=2e-3), key


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


BANK = ("--score.source=bank", "--score.shards=2", "--mask.strategy=importance")
DIVIDED = ("--train.parallel=fsdp", "--optim.ema_decay=0.9")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "whole_by", "legs"),
    [
        pytest.param(BANK, 1, [(1, 4), (2, 8), (1, 12)], id="score bank"),
        pytest.param(DIVIDED, 2, [(2, 4), (1, 8), (2, 12)], id="divided weights", marks=needs_mean),
    ],
)
def test_a_run_goes_on_at_another_world_size(tmp_path, settings, whole_by, legs):
    """Stopped within epochs, at another world size each time; maps, averages and divided weights are in checkpoints."""
    extra = (*settings, "--train.epochs=4")
    whole = losses(tmp_path / "whole", whole_by, *extra)
    for processes, steps in legs:
        resumed = losses(tmp_path / "legs", processes, *extra, f"--train.max_steps={steps}", "--resume=auto")
    assert len(resumed) == 12
    for a, b in zip(whole, resumed):
        assert a == pytest.approx(b, rel=2e-3)
