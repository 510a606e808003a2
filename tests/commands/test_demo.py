"""`ccmim demo`, made small: every figure and file that the real one gives."""

import json
import math

import pytest

from ccmim_fast.ablation import demo
from ccmim_fast.cli import main

SETTINGS = [
    "--data.samples=120",
    "--data.image_size=[32,32]",
    "--model.embed_dim=48",
    "--model.depth=2",
    "--model.num_heads=3",
    "--decoder.dim=32",
    "--train.epochs=4",
    "--train.batch_size=40",
    "--run.tensorboard=false",
]


@pytest.mark.slow
def test_small_demo(tmp_path, monkeypatch):
    monkeypatch.setattr("ccmim_fast.ablation.runs.HELD_OUT", 60)
    monkeypatch.setattr(demo, "PICTURES", 2)
    settings = [f"--run.dir={tmp_path / 'demo'}", f"--data.root={tmp_path / 'cache'}", *SETTINGS]
    assert main(["demo", *settings]) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert list(summary["methods"]) == ["untrained", "mae", "ccmim"]
    trained = {"knn", "logreg", "auroc", "leakage", "recons", "images_per_second", "auroc_early", "leakage_early"}
    for name, figures in summary["methods"].items():
        assert (trained if name != "untrained" else {"knn", "logreg", "auroc", "leakage", "recons"}) <= figures.keys()
        assert all(math.isfinite(value) for value in figures.values())
    assert summary["methods"]["mae"]["recons"] < summary["methods"]["mae"]["recons_start"]
    page = (tmp_path / "demo" / "report.html").read_text()
    # Two methods, five moments each, one picture per moment.
    assert page.count("data:image/png;base64,") == 10
    for method in ("mae", "ccmim"):
        assert len(list((tmp_path / "demo" / method / "snapshots").glob("epoch_*.npz"))) == 5
    # A second call does not overwrite what is there.
    assert main(["demo", *settings]) == 2
