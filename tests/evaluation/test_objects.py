"""AUROC and leakage of a run's own steps, where the objects are known: what `ccmim pretrain` adds to its records."""

import json
import sys

import pytest
import torch
from tiny import tiny_config

from ccmim_fast.cli import main
from ccmim_fast.engine.pretraining import fit
from ccmim_fast.evaluation.masks import objects
from ccmim_fast.evaluation.masks.objects import object_figures, object_leakage, object_patches, score_auroc

SETTINGS = ["--data.samples=16", "--data.image_size=[32,32]", "--model.arch=vit_tiny_patch16_224", "--score.source=all"]
SETTINGS += ["--model.patch_size=8", "--model.embed_dim=48", "--model.depth=2", "--model.num_heads=3"]
SETTINGS += [
    "--decoder.dim=32",
    "--decoder.num_heads=4",
    "--train.batch_size=8",
    "--train.epochs=1",
    "--optim.warmup_epochs=1",
]
SETTINGS += ["--train.precision=fp32", "--train.device=cpu", "--run.log_every=1", "--run.tensorboard=false"]


@pytest.fixture(autouse=True)
def no_counting(monkeypatch):
    """The FLOP counter takes a pass of its own before the run."""
    monkeypatch.setattr("ccmim_fast.engine.pretraining.count_flops", lambda step: {})


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def config_for(tmp_path, **sections):
    """Crops that may leave the object out, mirrored ones, two micro-batches a step."""
    return tiny_config(
        run={"dir": str(tmp_path / "run"), "tensorboard": False, "log_every": 1},
        data={"source": "shapes", "samples": 16, "root": str(tmp_path / "shapes"), "flip": True},
        train={"batch_size": 8, "epochs": 2, "precision": "fp32", "device": "cpu", "accumulate": 2},
        **sections,
    )


def test_figures_are_those_of_the_masks_and_scores_of_the_step(tmp_path):
    """The objects are painted white into the very images of the step, and read off them again."""
    found = []

    def look(run, batches, result):
        if not found:
            original = run.source.decode
            run.source.decode = lambda i: 255 * run.source.mask(i).astype("uint8")[..., None].repeat(3, 2)
            painted = next(run.loader.stream(4))  # the second micro-batch of the run
            run.source.decode = original
            assert painted.ids_B.tolist() == batches[-1].ids_B.tolist()
            found.append((object_patches(painted.images_BHWC[..., 0] > 127, 8), result.seen[-1]))
        return object_figures(run, batches, result)

    fit(config_for(tmp_path), more=look)
    ((object_BL, seen),) = found
    record = records(tmp_path / "run")[0]
    assert record["auroc"] == score_auroc(seen.logits_BL, object_BL)
    assert record["leakage"] == object_leakage(seen.mask_BL, object_BL)
    assert seen.mask_BL.shape == (4, 24)
    assert len({record["auroc"] for record in records(tmp_path / "run")}) == 4


def test_random_masks_have_no_auroc(tmp_path):
    fit(config_for(tmp_path, mask={"strategy": "random"}), more=object_figures)
    assert [record["auroc"] for record in records(tmp_path / "run")] == [None] * 4
    assert all(0 < record["leakage"] < 4 for record in records(tmp_path / "run"))


@pytest.mark.parametrize("shown", [False, True])
def test_crops_of_nothing_but_objects_or_without_any_have_no_auroc(tmp_path, monkeypatch, shown):
    monkeypatch.setattr(objects, "objects_of", lambda *_: torch.full((4, 24), shown))
    fit(config_for(tmp_path), more=object_figures)
    assert {record["auroc"] for record in records(tmp_path / "run")} == {None}
    # 6 of 24 patches are visible: a quarter of the objects, as with random masks.
    assert {record["leakage"] for record in records(tmp_path / "run")} == {1.0 if shown else None}


def test_scores_that_are_nan_have_no_auroc():
    half_BL = torch.tensor([[True, False]])
    assert objects._auroc(torch.tensor([[2.0, 1.0]]), half_BL) == 1
    assert objects._auroc(torch.tensor([[2.0, torch.nan]]), half_BL) is None


def test_pretraining_tells_of_objects_that_are_known(tmp_path):
    assert main(["pretrain", f"--run.dir={tmp_path / 'run'}", "--data.source=shapes", *SETTINGS]) == 0
    assert all(0 <= record["auroc"] <= 1 and record["leakage"] >= 0 for record in records(tmp_path / "run"))


def test_and_pays_nothing_where_they_are_not(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ccmim_fast.evaluation.masks.objects", None)  # cannot be imported
    assert main(["pretrain", f"--run.dir={tmp_path / 'run'}", "--data.source=photos", *SETTINGS]) == 0
    assert not any({"auroc", "leakage"} & record.keys() for record in records(tmp_path / "run"))
