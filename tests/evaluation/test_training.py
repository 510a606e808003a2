"""The protocols that train: end to end on shapes, resumed bit for bit, and on two processes.

Chance is 1/3 of 150 test images, with a standard deviation of 0.039. Margins are six of it at least.
"""

import json

import numpy as np
import pytest
import timm
import torch
from ranks_launcher import run_ranks
from safetensors.torch import load_file, save_file

from ccmim_fast.checkpoints import io
from ccmim_fast.config.evaluation import EvalOptimConfig
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.finetune import build_optimizer

CHANCE, MARGIN = 1 / 3, 0.25
SHORT = ["--train.batch_size=100", "--optim.warmup_epochs=2", "--run.test_every=100", "--run.log_every=1"]
TRAINS = {
    "linear": ["--head.rates=[1,10]", "--optim.base_lr=100", "--train.epochs=8"],
    "attentive": ["--optim.base_lr=0.25", "--train.epochs=8"],
    "finetune": [
        "--optim.base_lr=5e-3",
        "--train.epochs=4",
        "--augment.auto=rand-m3-mstd0.5-inc1",
        "--augment.mixup=0.1",
    ],
}


@pytest.mark.parametrize("name", TRAINS)
def test_beats_chance(evaluated, name):
    result = evaluated(name, *SHORT, *TRAINS[name])
    assert max(result["figures"].values()) > CHANCE + MARGIN
    assert any(line.startswith("train.batch_size: 100 (") for line in result["deviations"])
    assert (result["deviations"][0] == "encoder: width 48, patch 8 (ViT-B/16)") == (name == "finetune")


@pytest.mark.parametrize("name", TRAINS)
def test_goes_on_bit_for_bit(evaluated, tmp_path, name):
    """Stopped within an epoch, accumulating, with drop path and mixup: the same weights, moments and lines."""
    more = [*SHORT, *TRAINS[name], "--train.epochs=2", "--optim.warmup_epochs=1", "--train.accumulate=2"]
    more += ["--data.samples=300", "--train.batch_size=60"]
    evaluated(name, *more, folder="whole")
    evaluated(name, *more, "--train.max_steps=4", folder="parts")
    evaluated(name, *more, "--resume=auto", folder="parts")
    whole, parts = (io.newest(tmp_path / folder / "checkpoints").state for folder in ("whole", "parts"))
    assert whole["progress"]["step"] == parts["progress"]["step"] == 10
    for key in ("model", "optimizer"):
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=0, equal_nan=True)
    lines = [
        [(r["step"], r["loss"]) for r in map(json.loads, (tmp_path / folder / "metrics.jsonl").open()) if "loss" in r]
        for folder in ("whole", "parts")
    ]
    assert len(lines[0]) == 10
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_processes_that_augment_change_nothing(evaluated, tmp_path):
    """Randomness is keyed by the image and the step, not by the process that decodes it."""
    few = [*SHORT, *TRAINS["finetune"], "--train.max_steps=3"]
    for workers in (1, 2):
        evaluated("finetune", *few, f"--data.workers={workers}", folder=f"by{workers}")
    one, two = (io.newest(tmp_path / folder / "checkpoints").state["model"] for folder in ("by1", "by2"))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_another_setting_is_refused(evaluated):
    evaluated("attentive", *SHORT, "--train.epochs=1", "--optim.warmup_epochs=1")
    with pytest.raises(ConfigError, match=r"optim.base_lr=0.5: the checkpoint has 0.0125; use that, or --allow-change"):
        evaluated(
            "attentive", *SHORT, "--train.epochs=1", "--optim.warmup_epochs=1", "--resume=auto", "--optim.base_lr=0.5"
        )


def test_another_encoder_is_refused(evaluated, encoder, tmp_path):
    """Moved, it is the same; with one number changed it is another."""
    weights = load_file(encoder)
    save_file(weights, tmp_path / "moved.safetensors")
    weights["norm.bias"][0] += 1
    save_file(weights, tmp_path / "other.safetensors")
    short = [*SHORT, "--train.epochs=1", "--optim.warmup_epochs=1"]
    evaluated("attentive", *short)
    evaluated("attentive", *short, "--resume=auto", checkpoint=tmp_path / "moved.safetensors")
    with pytest.raises(ConfigError, match=r"began with another encoder; choose another run\.dir, or --overwrite"):
        evaluated("attentive", *short, "--resume=auto", checkpoint=tmp_path / "other.safetensors")


def test_odd_batches_cannot_be_mixed(evaluated):
    with pytest.raises(ConfigError, match=r"train\.batch_size=25: mixup needs pairs; nearest valid is 26"):
        evaluated("finetune", "--train.batch_size=25")


def test_the_crop_of_the_linear_probe_is_refused(evaluated):
    with pytest.raises(ConfigError, match=r"data\.crop_rule=mae: timm's augmentation has torchvision's; use that"):
        evaluated("finetune", "--data.crop_rule=mae")


def test_wide_pixels_are_rounded_aloud(evaluated, tmp_path, capsys):
    """Fine-tuning has 8 bits; a frozen encoder sees pixels as they are."""
    for part in ("train", "val"):
        for label in "ab":
            (tmp_path / "wide" / part / label).mkdir(parents=True)
            for number in range(4):
                pixels = np.random.default_rng(number).integers(0, 65536, (32, 32, 3)).astype(np.uint16)
                np.save(tmp_path / "wide" / part / label / f"{number}.npy", pixels)
    where = ["--data.source=images", f"--data.root={tmp_path / 'wide'}"]
    words = "pixels are rounded to 8 bits, on which the augmentation of this evaluation works\n"
    evaluated("knn", *where, "--knn.k=[1]", folder="knn")
    assert words not in capsys.readouterr().out
    evaluated("finetune", *where, "--train.batch_size=4", "--train.epochs=1", "--augment.auto=")
    assert capsys.readouterr().out.count(words) == 1


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_rates_of_blocks_are_maes(pool):
    """decay^(depth + 1) at the embedding, decay^(depth - i) at block i, 1 at the head and the last norm."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=4, global_pool=pool, fc_norm=pool == "avg", **sizes)
    optimizer = build_optimizer(vit, EvalOptimConfig(weight_decay=0.05, layer_decay=0.65))
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in vit.named_parameters():
        first, *rest = name.split(".")
        power = 3 - int(rest[0]) if first == "blocks" else 0 if first in ("head", "fc_norm", "norm") else 4
        decay = 0.0 if parameter.ndim == 1 or first in ("cls_token", "pos_embed") else 0.05
        assert found[id(parameter)] == (pytest.approx(0.65**power), decay), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knn", "views", "finetune"])
def test_two_processes_equal_one(evaluated, encoder, cache, shared_settings, tmp_path, name):
    """151 test images: one rank has one more. Without mixup and drop path, which ranks draw each for themselves."""
    more = ["--knn.k=[1,10]", "--data.test_samples=151"]
    if name == "finetune":
        more = [
            *SHORT,
            "--train.epochs=1",
            "--optim.warmup_epochs=1",
            "--optim.base_lr=5e-3",
            "--augment.mixup=0",
            "--augment.cutmix=0",
        ]
        more += ["--model.drop_path=0", "--data.test_samples=151", "--train.accumulate=2"]
    one = evaluated(name, *more, folder="one")
    settings = [*shared_settings, f"--data.root={cache}", f"--run.dir={tmp_path / 'two'}", *more]
    run_ranks(2, "-m", "ccmim_fast.cli", "eval", name, str(encoder), *settings)
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["ranks"] == 2
    np.testing.assert_allclose(list(two["figures"].values()), list(one["figures"].values()), atol=1.01 / 151)
    if name == "finetune":
        a, b = (io.newest(tmp_path / folder / "checkpoints").state["model"] for folder in ("one", "two"))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
