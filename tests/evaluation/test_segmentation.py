"""`ccmim eval segmentation` as a user starts it: it learns, goes on bit for bit, reads ADE20K, and what it refuses.

Chance is to name every pixel background, the most frequent of three classes.
"""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from ranks_launcher import run_ranks
from safetensors.torch import save_file

from ccmim_fast import cli
from ccmim_fast.checkpoints import io
from ccmim_fast.config.schema import DataConfig
from ccmim_fast.errors import DataError
from ccmim_fast.evaluation.protocols import protocol
from ccmim_fast.evaluation.segmentation.scenes import shape_scenes

SMALL = [
    *("--data.classes=2", "--segment.sides=[32,128]", "--segment.ratio=[1,1.2]", "--segment.stride=21"),
    *("--segment.decoder_dim=32", "--segment.auxiliary_dim=16", "--optim.base_lr=0.1", "--optim.layer_decay=0.9"),
    *("--train.batch_size=20", "--optim.warmup_steps=10", "--run.log_every=1", "--run.test_every=100"),
]
FEW = [*SMALL, "--data.samples=30", "--data.test_samples=13", "--train.batch_size=12", "--train.accumulate=2"]
FEW += ["--optim.warmup_steps=1"]
MARGIN = 0.15  # of mIoU; 0.22 and 0.23 were seen after 120 and 160 steps


def test_beats_chance(evaluated, cache):
    """Two shapes on a background, from features that know the shapes."""
    result = evaluated("segmentation", *SMALL, "--train.steps=120")
    of_test = DataConfig(source="shapes", image_size=(32, 32), samples=150, classes=2, root=str(cache))
    scenes = shape_scenes(of_test, seed=1)
    background = np.mean([scenes.labels(index) == 0 for index in range(150)])
    figures = result["figures"]
    assert figures["mIoU"] > background / 3 + MARGIN
    assert figures["aAcc"] > background
    assert figures["mAcc"] > 1 / 3 + MARGIN
    assert result["chance"] is None
    assert "segment.stride: 21 (341)" in result["deviations"]


def test_goes_on_bit_for_bit(evaluated, tmp_path):
    """Stopped within an epoch, accumulating, with drop path and dropout: the same weights, statistics, and figures."""
    whole = evaluated("segmentation", *FEW, "--train.steps=6", folder="whole")
    evaluated("segmentation", *FEW, "--train.steps=6", "--train.max_steps=3", folder="parts")
    parts = evaluated("segmentation", *FEW, "--train.steps=6", "--resume=auto", folder="parts")
    states = [io.newest(tmp_path / folder / "checkpoints").state for folder in ("whole", "parts")]
    assert [state["progress"]["step"] for state in states] == [6, 6]
    for key in ("model", "optimizer"):
        torch.testing.assert_close(states[1][key], states[0][key], rtol=0, atol=0)
    losses = [
        [(r["step"], r["loss"]) for r in map(json.loads, (tmp_path / folder / "metrics.jsonl").open()) if "loss" in r]
        for folder in ("whole", "parts")
    ]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
    assert whole["figures"] == parts["figures"]


def test_the_second_classifiers_loss_counts_by_its_weight(evaluated, tmp_path):
    """The loss of the first step is a line over the weight."""
    losses = []
    for weight in (0, 0.4, 0.8):
        evaluated("segmentation", *FEW, f"--segment.auxiliary_weight={weight}", "--train.steps=1", folder=f"by{weight}")
        losses += [r["loss"] for r in map(json.loads, (tmp_path / f"by{weight}/metrics.jsonl").open()) if "loss" in r]
    none, some, twice = losses
    assert some - none == pytest.approx(twice - some)
    assert some - none > 0.4 * 0.5  # the cross-entropy of three classes that are not known is about 1.1


def test_reads_ade20k(evaluated, miniature):
    """Images smaller than a window are made larger; the first column of each has no class and does not count."""
    result = evaluated(
        "segmentation",
        *SMALL,
        *("--data.source=ade20k", f"--data.root={miniature}", "--train.batch_size=2", "--train.steps=2"),
        "--optim.warmup_steps=2",
    )
    assert result["images"] == "5 images of 3 classes to train on, 3 images of 3 classes to test on"
    assert result["figures"].keys() == {"mIoU", "aAcc", "mAcc"}
    assert all(0 <= share <= 1 for share in result["figures"].values())


@pytest.mark.parametrize("arch", ["vit_base_patch16_siglip_224", "vit_small_patch14_reg4_dinov2"])
def test_encoders_without_cls_or_with_registers(evaluated, tmp_path, arch):
    """Of these kinds, but small: what pools their tokens has no part in it."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    save_file(timm.create_model(arch, num_classes=0, **sizes).state_dict(), tmp_path / "vit.safetensors")
    given = [*FEW, f"--model.arch={arch}", "--model.num_heads=3", "--train.steps=1"]
    result = evaluated("segmentation", *given, checkpoint=tmp_path / "vit.safetensors")
    assert result["figures"]["mIoU"] > 0


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_nothing_to_test_on_is_told(evaluated, miniature, tmp_path):
    """Annotations to test on of no class at all."""
    for path in (miniature / "annotations" / "validation").iterdir():
        with Image.open(path) as image:
            nothing = Image.new("L", image.size)
        nothing.save(path)
    settings = [*SMALL, "--data.source=ade20k", f"--data.root={miniature}", "--train.batch_size=2", "--train.steps=1"]
    with pytest.raises(DataError, match=r"Challenge\w+: no pixel of the 3 images to test on has a class\Z"):
        evaluated("segmentation", *settings)
    assert not (tmp_path / "out").exists()


def test_bad_scenes_are_left_out(evaluated, miniature, tmp_path, capsys):
    """An annotation that does not decode, one of another size, one of numbers beyond the classes; 16 bits are read.

    The images themselves are not put down as bad: pretraining on them needs no labels.
    """
    validation, training = (miniature / "annotations" / part for part in ("validation", "training"))
    with Image.open(training / "ADE_training_0.png") as image:
        Image.fromarray(np.asarray(image).astype(np.uint16)).save(training / "ADE_training_0.png")
    Image.new("L", (7, 7)).save(training / "ADE_training_1.png")
    Image.new("L", (24, 21), 77).save(validation / "ADE_validation_1.png")
    (validation / "ADE_validation_2.png").write_bytes((validation / "ADE_validation_2.png").read_bytes()[:50])
    settings = [*SMALL, "--data.source=ade20k", f"--data.root={miniature}", "--train.batch_size=2", "--train.steps=5"]
    settings.append("--optim.warmup_steps=1")
    with pytest.raises(DataError, match=r"more than data.max_bad=0.01, the last .*ADE_validation_\d.png: "):
        evaluated("segmentation", *settings)
    assert not (tmp_path / "out").exists()
    result = evaluated("segmentation", *settings, "--data.max_bad=0.7")
    assert result["left_out"]["test"] == {
        "that cannot be read": {
            "images": 2,
            "of": 3,
            "first": str(miniature / "images/validation/ADE_validation_1.jpg"),
        }
    }
    said = capsys.readouterr().out
    assert said.index("2 of 3 images to test on that cannot be read") < said.index("step 1")
    assert "ADE_training_1.png: 7 x 7 pixels, and its image" in said
    assert not list((tmp_path / "cache").rglob("*.bad"))


@pytest.mark.slow
def test_two_processes_test_what_is_saved(evaluated, encoder, cache, shared_settings, tmp_path):
    """13 test images: one rank has one more. The checkpoint tested again by one process has the same figures."""
    settings = [*shared_settings, f"--data.root={cache}", f"--run.dir={tmp_path / 'two'}", *FEW, "--train.steps=4"]
    run_ranks(2, "-m", "ccmim_fast.cli", "eval", "segmentation", str(encoder), *settings)
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["ranks"] == 2
    one = evaluated("segmentation", *FEW, "--train.steps=4", "--resume=auto", folder="two")
    assert one["ranks"] == 1
    assert one["figures"] == pytest.approx(two["figures"], abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (["--data.source=images"], 2, "segmentation has ade20k, shapes; nearest valid is"),
        (["--optim.name=sgd"], 2, "optim.name=sgd: segmentation has adamw"),
        (["--data.mean=[0.5]"], 2, "data.mean=[0.5]: segmentation needs images of 3 channels"),
        (["--data.std=[0.5]"], 2, "data.std=[0.5]: segmentation needs images of 3 channels"),
        (["--segment.stride=33"], 2, "segment.stride=33: windows of data.image_size=[32, 32] must touch; nearest"),
        (["--segment.sides=[31,99]"], 2, "segment.sides=[31, 99]: the short one must hold a window"),
        (["--segment.sides=[99,32]"], 2, "segment.sides=[99, 32]: must be from small to large"),
        (["--segment.ratio=[2,1]"], 2, "segment.ratio=[2.0, 1.0]: must be from small to large; nearest valid is [1.0"),
        (["--segment.most=0"], 2, "segment.most=0.0: must be in (0, 1]"),
        (["--data.image_size=[30,32]"], 2, "whole patches of 8 pixels, two at least a side; nearest valid is [32, 32]"),
        (["--train.batch_size=2", "--train.accumulate=2"], 2, "needs two images in each of 2 micro-batches; nearest"),
        (["--data.source=ade20k"], 3, "images/training: no such folder"),
        (["--config=knn"], 2, "no preset of ccmim eval segmentation; one of segmentation, segmentation_cae"),
    ],
)
def test_mistakes_are_one_line(settings, code, words, encoder, shared_settings, tmp_path, capsys):
    line = ["eval", "segmentation", str(encoder), *shared_settings, *SMALL, f"--run.dir={tmp_path / 'out'}"]
    assert cli.main([*line, f"--data.root={tmp_path}", "--data.samples=30", "--train.max_steps=1", *settings]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_a_missing_library_is_named_with_its_command(encoder, shared_settings, tmp_path, monkeypatch, capsys):
    there = importlib.util.find_spec
    hidden = "segmentation_models_pytorch"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == hidden else there(name))
    line = ["eval", "segmentation", str(encoder), *shared_settings, *SMALL, f"--run.dir={tmp_path / 'out'}"]
    assert cli.main([*line, "--data.samples=30", "--train.max_steps=1"]) == 6
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'ccmim_fast[segmentation]'" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_other_evaluations_do_not_import_it():
    code = "import sys, ccmim_fast.evaluation.run; print('segmentation_models_pytorch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(("name", "rate"), [("segmentation", 1e-4), ("segmentation_cae", 3e-4)])
def test_presets_hold_the_figures_of_their_protocols(name, rate):
    config = protocol("segmentation", name).config
    optim, train, segment = config.optim, config.train, config.segment
    assert optim.base_lr * train.batch_size / 256 == pytest.approx(rate)
    assert (optim.name, optim.weight_decay, optim.betas, optim.layer_decay) == ("adamw", 0.05, (0.9, 0.999), 0.65)
    assert (optim.schedule, optim.min_lr, optim.warmup_steps) == ("poly", 0, 1500)
    assert (train.steps, train.batch_size, config.model.drop_path) == (160000, 16, 0.1)
    assert (config.data.image_size, config.data.flip) == ((512, 512), True)
    assert (segment.sides, segment.ratio, segment.most, segment.stride) == ((512, 2048), (0.5, 2), 0.75, 341)
    assert (segment.auxiliary_dim, segment.auxiliary_weight, segment.dropout) == (256, 0.4, 0.1)
