"""Published layouts become checkpoints that export, embed and pretrain take; what does not fit is named."""

import pytest
import timm
import torch
from made_run import make_run
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.convert import to_flat, to_timm
from ccmim_fast.checkpoints.run import open_run
from ccmim_fast.cli import main
from ccmim_fast.export.plain import method

ARCH = "vit_tiny_patch16_224"
SQUARE = {"image_size": (32, 32)}
# What no weight tells.
HEADS = ["--model.num_heads=3", "--decoder.num_heads=4"]


def made(contrast):
    model, _ = tiny_model(torch.float32, data=SQUARE, contrast={"loss": contrast})
    return model


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("contrast", ["none", "nce", "align"])
def test_flat_layout(tmp_path, contrast, capsys):
    """MAE's, and the authors' with their projector; all sizes are read off the weights."""
    model = made(contrast)
    torch.save({"model": to_flat(model.state_dict()), "epoch": 3}, tmp_path / "file.pth")
    out = tmp_path / "run"
    assert main(["import", str(tmp_path / "file.pth"), "--arch", ARCH, "--out", str(out), *HEADS]) == 0
    assert "starts anew" not in capsys.readouterr().out
    trained = open_run(str(out))
    same(trained.model.state_dict(), model.state_dict())
    assert trained.config.contrast.loss == contrast
    assert trained.config.data.image_size == (32, 32)
    assert trained.config.decoder.depth == 2
    assert method(trained.config) == ("MAE" if contrast == "none" else "ccMIM")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timm_encoder(tmp_path, capsys, suffix):
    vit = timm.create_model(ARCH, num_classes=10, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    file = tmp_path / f"vit.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(vit.state_dict(), file)
    assert main(["import", str(file), "--arch", ARCH, "--out", str(tmp_path / "run"), *HEADS]) == 0
    assert capsys.readouterr().out.endswith("step_00000000; not in the file, starts anew: decoder, projector\n")
    expected = {name: value for name, value in vit.state_dict().items() if not name.startswith("head.")}
    same(to_timm(open_run(str(tmp_path / "run")).model.state_dict()), expected)


def test_an_export_comes_back(tmp_path):
    model, _ = make_run(tmp_path / "run", data=SQUARE)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert main(["export", "safetensors", str(tmp_path / "run"), str(first)]) == 0
    assert main(["import", str(first), "--out", str(second), *HEADS]) == 0
    same(load_file(second), model.state_dict())


def test_pretraining_goes_on_from_it(tmp_path, capsys):
    model = made("none")
    torch.save(to_flat(model.state_dict()), tmp_path / "file.pth")
    sizes = ["--data.image_size=[32,32]", "--model.patch_size=8", "--model.embed_dim=48", "--model.depth=3"]
    sizes += [f"--model.arch={ARCH}", "--decoder.dim=32", "--contrast.loss=none", "--mask.strategy=random", *HEADS]
    assert main(["import", str(tmp_path / "file.pth"), "--arch", ARCH, "--out", str(tmp_path / "run"), *HEADS]) == 0
    path = tmp_path / "run" / "checkpoints" / "step_00000000"
    # A rate at which nothing moves: what is saved is what it began with.
    data = ["--data.source=shapes", "--data.samples=8", "--train.batch_size=8", "--train.precision=fp32"]
    short = ["--train.device=cpu", "--train.max_steps=1", "--optim.base_lr=1e-30", "--run.tensorboard=false"]
    options = [*sizes, *data, *short, f"--run.dir={tmp_path / 'next'}", f"--run.resume={path}", "--allow-change"]
    assert main(["pretrain", *options]) == 0, capsys.readouterr().err
    assert "the images are not those" not in capsys.readouterr().out
    same(io.newest(tmp_path / "next" / "checkpoints").state["model"], model.state_dict())


def test_what_does_not_fit_is_named(tmp_path, capsys):
    flat = to_flat(made("nce").state_dict())
    whole = dict(flat)
    flat.pop("blocks.1.norm1.bias")
    flat["extra.weight"] = torch.zeros(1)
    flat["norm.weight"] = torch.zeros(7)
    torch.save(flat, tmp_path / "file.pth")
    save_file(whole, tmp_path / "whole.safetensors")
    (tmp_path / "text.pth").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    here = str(tmp_path)
    for argv, code, words in (
        (
            [f"{here}/file.pth", "--arch", ARCH, "--out", f"{here}/run", *HEADS],
            5,
            ["missing: encoder.blocks.1.norm1.bias; unexpected: encoder.extra.weight; of another shape: encoder.norm"],
        ),
        ([f"{here}/text.pth", "--arch", ARCH, "--out", f"{here}/run"], 5, ["cannot be read as weights"]),
        ([f"{here}/whole.safetensors", "--out", f"{here}/run"], 2, ["add --arch NAME"]),
        ([f"{here}/whole.safetensors", "--arch", "vit_tin", "--out", f"{here}/run"], 2, ["--arch='vit_tin'"]),
        (
            [f"{here}/whole.safetensors", "--arch", "vit_relpos_small_patch16_224", "--out", f"{here}/run"],
            2,
            ["model.arch=vit_relpos_small_patch16_224 is a VisionTransformerRelPos; expected timm's VisionTransformer"],
        ),
        ([f"{here}/whole.safetensors", "--arch", ARCH, "--out", f"{here}/full", *HEADS], 2, ["not empty"]),
        (["--out", f"{here}/run"], 2, ["required: FILE"]),
    ):
        assert main(["import", *argv]) == code, capsys.readouterr().err
        (line,) = capsys.readouterr().err.splitlines()
        assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()
