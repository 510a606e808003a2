"""`ccmim eval` end to end on shapes, what it reads and what it refuses.

Chance is 1/3 of 150 test images, with a standard deviation of 0.039. Margins are six of it at least.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from tiny import tiny_config

from ccmim_fast import cli
from ccmim_fast.checkpoints.run import open_run
from ccmim_fast.config.evaluation import EvalConfig, EvalModelConfig, protocol_crop
from ccmim_fast.config.load import presets
from ccmim_fast.engine.pretraining import fit
from ccmim_fast.evaluation.encoders import build_encoder, read_encoder
from ccmim_fast.evaluation.masks.subject import read_subject
from ccmim_fast.evaluation.protocols import protocol
from ccmim_fast.evaluation.registry import EVALUATIONS
from ccmim_fast.evaluation.supervised import Supervised
from ccmim_fast.export.plain import export_timm
from ccmim_fast.models.encoder import build_encoder as ours

CHANCE, MARGIN = 1 / 3, 0.25
IMAGENET = (1281167, 50000, 1000)  # images to train on, to test on, classes
PUBLISHED = {"segmentation": (20210, 2000, 150)}  # ADE20K


def test_knn_beats_chance(evaluated):
    result = evaluated("knn", "--knn.k=[1,10]")
    assert result["figures"].keys() == {"k=1", "k=10"}
    assert min(result["figures"].values()) > CHANCE + MARGIN
    assert result["chance"] == pytest.approx(CHANCE)


def test_logreg_beats_chance(evaluated):
    assert evaluated("logreg")["figures"]["accuracy"] > CHANCE + MARGIN


def test_random_labels_are_at_chance(evaluated, monkeypatch):
    """What beats chance above is what the features know, not a leak of labels."""
    from ccmim_fast.data.made import base

    monkeypatch.setattr(base, "balanced_labels", lambda seed, n, k: torch.randint(k, (n,)).numpy())
    figures = evaluated("knn", "--knn.k=[10]")["figures"]
    assert abs(figures["k=10"] - CHANCE) < 0.15


def test_deviations_are_listed_and_only_those(evaluated, tmp_path, capsys):
    result = evaluated("knn", "--knn.k=[10,20,100,200]", "--data.test_crop=0.875", "--knn.temperature=0.1")
    assert result["deviations"] == [
        "images: 300 images to train on, 150 to test on, 3 classes "
        "(1281167 images to train on, 50000 to test on, 1000 classes)",
        "data.image_size: [32, 32] ([224, 224])",
        "knn.temperature: 0.1 (0.07)",
    ]
    printed = capsys.readouterr().out
    written = (tmp_path / "out" / "result.md").read_text()
    for line in result["deviations"]:
        assert f"> - {line}\n" in printed
        assert f"> - {line}\n" in written
    assert "DINO" in printed


@pytest.mark.parametrize("name", [name for name in presets("eval") if not name.startswith(("transfer", "detection"))])
def test_presets_hold_the_figures_of_their_protocols(name):
    of = protocol(next(evaluation for evaluation in EVALUATIONS if name.startswith(evaluation)), name)
    assert of.source
    assert of.images == PUBLISHED.get(of.evaluation, IMAGENET)
    optim, train = of.config.optim, of.config.train
    peak = optim.base_lr * train.batch_size / 256
    figures = {
        "linear": ("lars", 6.4, 16384, 90, 10, 0.0),
        "attentive": ("sgd", 0.4, 8192, 90, 10, 0.0),
        "finetune": ("adamw", 2e-3, 1024, 100, 5, 0.05),
        "finetune_large": ("adamw", 4e-3, 1024, 50, 5, 0.05),
        "linear_ccmim": ("lars", 6.4, 16384, 90, 10, 0.0),
        "finetune_huge": ("adamw", 4e-3, 1024, 50, 5, 0.05),
        "finetune_ccmim": ("adamw", 4e-3, 1024, 100, 5, 0.05),
    }
    if name.startswith("finetune"):
        sizes = {"finetune": (0.65, 0.1), "finetune_large": (0.75, 0.2), "finetune_huge": (0.75, 0.3)}
        size = sizes.get(name, (0.75, 0.1))
        augment = of.config.augment
        assert (optim.layer_decay, of.config.model.drop_path) == size
        assert (optim.betas, optim.min_lr, of.config.head.init_std) == ((0.9, 0.999), 1e-6, 2e-5)
        assert (augment.auto, augment.erase) == ("rand-m9-mstd0.5-inc1", 0.25)
        assert (augment.mixup, augment.cutmix, augment.smoothing, augment.repeats) == (0.8, 1.0, 0.1, 1)
    if name in figures:
        rule, rate, *rest = figures[name]
        assert (optim.name, pytest.approx(peak)) == (rule, rate)
        assert [train.batch_size, train.epochs, optim.warmup_epochs, optim.weight_decay] == rest
    elif of.evaluation in ("knn", "logreg"):
        assert of.config == replace(EvalConfig(), model=EvalModelConfig(fc_norm=False))


@pytest.mark.parametrize(
    ("name", "pool", "crop_rule", "test_crops", "expected"),
    [
        ("linear", "cls", "mae", (0.875, 0.875), "67.8"),
        ("linear_ccmim", "avg", "mae", (0.875, 0.875), "68.9"),
        ("finetune", "avg", "torchvision", (0.875, 1.0), "83.57"),
        ("finetune_large", "avg", "torchvision", (0.875, 1.0), "85.9"),
        ("finetune_huge", "avg", "torchvision", (0.875, 1.0), "86.9"),
        ("finetune_ccmim", "avg", "torchvision", (0.875, 1.0), "84.2"),
        ("attentive", "avg", "torchvision", (0.875, 0.875), ""),
        ("transfer_flowers", "avg", "torchvision", (0.875, 0.875), "99.2"),
    ],
)
def test_presets_crop_and_pool_as_their_sources(name, pool, crop_rule, test_crops, expected):
    """What is shown of a test image at 224 and at 384 pixels; the result beside the pooling that it is of."""
    of = protocol(next(evaluation for evaluation in EVALUATIONS if name.startswith(evaluation)), name)
    data, model = of.config.data, of.config.model
    assert (model.pool, model.fc_norm, model.resample, data.crop_rule) == (pool, True, "plain", crop_rule)
    assert data.crop_scale == (0.08, 1.0)
    assert tuple(data.test_crop or protocol_crop((side, side)) for side in (224, 384)) == test_crops
    heads = presets("eval")[name].read_text().partition("# Expected: ")
    assert expected in heads[2].split(". ")[0]


@pytest.mark.parametrize(
    ("preset", "rates"),
    [
        ("finetune", {0: 0, 2.5: 1e-3, 5: 2e-3, 52.5: 1.0005e-3, 100: 1e-6}),
        ("finetune_ccmim", {0: 0, 2.5: 2e-3, 5: 4e-3, 52.5: 2.0005e-3, 100: 1e-6}),
        ("finetune_large", {1: 8e-4, 5: 4e-3, 27.5: 2.0005e-3, 50: 1e-6}),
        ("linear", {0: 0, 5: 3.2, 10: 6.4, 50: 3.2, 70: 6.4 * 0.14644661, 90: 0}),
        ("transfer", {2.5: 1.5e-4, 5: 3e-4, 182.5: 1.55e-4, 360: 1e-5}),
        ("segmentation", {750 / 160000: 0.5e-4 * (1 - 750 / 160000), 0.5: 0.5e-4, 1: 0}),
    ],
)
def test_rates_of_a_whole_run(preset, rates):
    """By epochs of ImageNet's size; of segmentation, by shares of its steps."""
    config = protocol(next(evaluation for evaluation in EVALUATIONS if preset.startswith(evaluation)), preset).config
    samples, train = 1281167, config.train
    run = SimpleNamespace(config=config, loader=SimpleNamespace(plan=SimpleNamespace(samples=samples)))
    one = train.steps * train.batch_size or samples
    for at, rate in rates.items():
        assert Supervised._rate(run, at * one) == pytest.approx(rate, rel=1e-6, abs=1e-12), at


def test_a_test_crop_that_is_left_to_the_size(evaluated):
    """What is recorded is a number, and no deviation."""
    result = evaluated("knn", "--knn.k=[1]", "--data.test_crop=0", "--data.samples=20", "--data.test_samples=10")
    assert result["config"]["data.test_crop"] == 0.875
    assert not any(line.startswith("data.test_crop") for line in result["deviations"])


def tiny_run(folder, size=(32, 32), **model):
    """A run of pretraining of one step, with another mean of its images."""
    fit(
        tiny_config(
            run={"dir": str(folder), "tensorboard": False},
            data={"source": "shapes", "samples": 8, "image_size": size, "mean": (0.4, 0.5, 0.6)},
            model=model,
            train={"batch_size": 8, "epochs": 1, "precision": "fp32", "device": "cpu"},
        )
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of six heads."""
    folder = tmp_path_factory.mktemp("run") / "run"
    tiny_run(folder, num_heads=6)
    return folder


def test_a_run_and_its_checkpoint_and_its_export_are_the_same_encoder(run, tmp_path):
    [exported] = export_timm(open_run(str(run)), tmp_path / "e.safetensors")
    checkpoint = next((run / "checkpoints").glob("step_*"))
    pixels = torch.randn(2, 3, 32, 32)
    weights = [
        read_encoder(str(run)),
        read_encoder(str(checkpoint)),
        read_encoder(str(exported), "vit_tiny_patch16_224"),
    ]
    of_run, of_checkpoint, of_export = (
        build_encoder(w, (32, 32), num_heads=6).eval().forward_features(pixels) for w in weights
    )
    assert torch.equal(of_run, of_checkpoint)
    assert torch.equal(of_run, of_export)
    assert weights[0].num_heads == 6
    assert weights[0].mean == (0.4, 0.5, 0.6)
    # Other heads are another function: the comparison has power.
    assert not torch.equal(of_run, build_encoder(weights[2], (32, 32), num_heads=3).eval().forward_features(pixels))


def test_maes_file_and_other_sizes(tmp_path):
    """A flat file with a decoder in it; at another size its positions are resampled."""
    vit = ours(
        "vit_tiny_patch16_224", image_size=(32, 32), channels=3, patch_size=8, embed_dim=48, depth=2, num_heads=3
    )
    flat = vit.state_dict() | {"mask_token": torch.zeros(1, 1, 8), "decoder_blocks.0.norm1.weight": torch.zeros(8)}
    torch.save({"model": flat}, tmp_path / "mae.pth")
    weights = read_encoder(str(tmp_path / "mae.pth"), "vit_tiny_patch16_224", pretrained_size=(32, 32))
    pixels = torch.randn(2, 3, 32, 32)
    read = build_encoder(weights, (32, 32), num_heads=3).eval()
    torch.testing.assert_close(read.forward_features(pixels), vit.eval().forward_features(pixels))
    larger = build_encoder(weights, (64, 48), num_heads=3).eval()
    assert larger.forward_features(torch.randn(1, 3, 64, 48)).shape == (1, 1 + 8 * 6, 48)
    expected = resample_abs_pos_embed(vit.pos_embed, new_size=(8, 6), old_size=(4, 4))
    torch.testing.assert_close(larger.pos_embed, expected)


@pytest.mark.parametrize("any_size", [False, True])
@pytest.mark.parametrize("told_by", ["run", "export"])
def test_positions_stay_where_the_run_had_them(told_by, any_size, tmp_path):
    """A run of 2 x 8 patches, read at as many in a square, at its transpose, and at other numbers."""
    tiny_run(tmp_path / "run", (16, 64))
    trained = open_run(str(tmp_path / "run"))
    [exported] = export_timm(trained, tmp_path / "e.safetensors")
    weights = read_encoder(str({"run": tmp_path / "run", "export": exported}[told_by]))
    assert told_by == "run" or read_subject(str(exported), ["--decoder.depth=1"]).config.data.image_size == (16, 64)
    own = trained.model.encoder.pos_embed
    for rows, columns in ((2, 8), (4, 4), (8, 2), (7, 7)):
        size = (8 * rows, 8 * columns)
        vit = build_encoder(weights, size, any_size=any_size).eval()
        expected = resample_abs_pos_embed(own, new_size=(rows, columns), old_size=(2, 8))
        torch.testing.assert_close(vit.pos_embed, expected, msg=f"{rows} x {columns}")
        assert torch.equal(vit.pos_embed, own) == ((rows, columns) == (2, 8))
        assert vit.forward_features(torch.zeros(1, 3, *size)).isfinite().all()


def test_positions_are_not_resampled_by_the_size_of_timms_weights(tmp_path):
    """7 x 28 patches of 16 pixels are as many as 14 x 14, timm's own: they are no square for that."""
    tiny_run(tmp_path / "run", (112, 448), patch_size=16)
    vit = build_encoder(read_encoder(str(tmp_path / "run")), (112, 448))
    assert torch.equal(vit.pos_embed, open_run(str(tmp_path / "run")).model.encoder.pos_embed)


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ([], 2, "the evaluation is missing; one of knn"),
        (["knm", "timm:vit_tiny_patch16_224"], 2, "'knm|knm: no such evaluation; nearest: knn"),
        (["knn"], 2, "required: CHECKPOINT"),
        (["knn", "timm:vit_tiny_patch16"], 2, "no model of timm; nearest is vit_tiny_patch16_224"),
        (["knn", "nowhere.pth"], 5, "nowhere.pth: cannot be read as weights"),
        (["knn", "timm:vit_tiny_patch16_224", "--knn.kk=1"], 2, "did you mean --knn.k?"),
        (["knn", "timm:vit_tiny_patch16_224", "--knn.k=[0]"], 2, "knn.k=[0]: must be in [1, 2147483647]"),
        (
            ["knn", "timm:vit_tiny_patch16_224", "--data.std=[0,1,1]"],
            2,
            "data.std=[0.0, 1.0, 1.0]: must be in (0, inf)",
        ),
        (["linear", "timm:vit_tiny_patch16_224", "--config", "finetune"], 2, "no preset of ccmim eval linear"),
        (["knn", "timm:vit_tiny_patch16_224", "--data.root=nowhere"], 2, "say where they are"),
        (["knn", "timm:vit_tiny_patch16_224", "--data.source=shapes", "--data.samples=9"], 2, "must be at most the 9"),
    ],
)
def test_mistakes_are_one_line(line, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", *line]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert any(part in error for part in words.split("|"))


def test_an_image_folder(tmp_path):
    """Red and blue images: train/ beside val/, no crop needed to tell them apart."""
    from PIL import Image

    for part, count in (("train", 12), ("val", 6)):
        for name, colour in (("blue", (20, 30, 200)), ("red", (200, 30, 20))):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (48, 40), tuple(c + i for c in colour)).save(tmp_path / part / name / f"{i}.png")
    out = tmp_path / "out"
    line = ["eval", "knn", "timm:test_vit", f"--data.root={tmp_path}", "--data.image_size=[32,32]", "--knn.k=[3]"]
    assert cli.main([*line, f"--run.dir={out}", "--train.device=cpu"]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["figures"] == {"k=3": 1.0}
    assert result["images"] == "24 images of 2 classes to train on, 12 images of 2 classes to test on"
