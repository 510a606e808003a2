"""timm and safetensors files: loaded as their readers load them, they give our features."""

import json

import pytest
import timm
import torch
from made_run import make_run
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import images

from ccmim_fast.cli import main
from ccmim_fast.models.tokens import tokens_of

# The same function in float32, by two orders of the arithmetic.
NEAR = {"rtol": 0, "atol": 1e-5}


def normalised(pictures, config):
    mean, std = (torch.tensor(values) for values in (config.data.mean, config.data.std))
    return ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def exported(tmp_path, target, out="out", **sections):
    model, config = make_run(tmp_path / "run", **sections)
    assert main(["export", target, str(tmp_path / "run"), str(tmp_path / out)]) == 0
    return model, config, tmp_path / out


def ours(model, pictures):
    with torch.no_grad():
        return tokens_of(model.encoder, model.mean_C, model.std_C)(pictures)


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_medium_patch16_reg4_gap_256"])
def test_timm_gives_our_features(tmp_path, arch):
    """The second has registers, and positions for patches alone."""
    model, config, file = exported(tmp_path, "timm", "encoder.safetensors", model={"arch": arch})
    arguments = json.loads(metadata(file)["timm_arguments"])
    target = timm.create_model(arch, num_classes=0, checkpoint_path=str(file), **arguments).eval()
    pictures = images()
    with torch.no_grad():
        tokens = target.forward_features(normalised(pictures, config))
    torch.testing.assert_close(tokens, ours(model, pictures), **NEAR)


def test_timm_folder_needs_no_arguments(tmp_path):
    model, config, folder = exported(tmp_path, "timm")
    target = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pictures = images()
    with torch.no_grad():
        cls = target(normalised(pictures, config))
    torch.testing.assert_close(cls, ours(model, pictures)[:, 0], **NEAR)
    wanted = timm.data.resolve_data_config(model=target)
    assert tuple(wanted["input_size"]) == (3, 32, 48)
    assert tuple(wanted["mean"]) == config.data.mean


def test_the_file_says_what_it_is(tmp_path):
    _, _, file = exported(tmp_path, "timm", "a/encoder.safetensors", data={"root": "/home/me/secret"})
    about = metadata(file)
    assert about["arch"] == "vit_tiny_patch16_224"
    assert about["method"] == "ccMIM"
    assert json.loads(about["image_size"]) == [32, 48]
    assert about["patch_size"] == "8"
    assert json.loads(about["mean"])[0] == 0.485
    assert about["ccmim_fast_commit"] == "abc123"
    assert about["step"] == "7"
    assert "embed_dim: 48" in about["settings"]
    assert "secret" not in str(about), "places of this machine are told to nobody"


def test_averages_are_taken(tmp_path):
    model, _, file = exported(tmp_path, "timm", "encoder.safetensors", averaged=True)
    assert metadata(file)["averaged_weights"] == "true"
    assert torch.equal(load_file(file)["blocks.1.attn.qkv.weight"], model.encoder.blocks[1].attn.qkv.weight)


def test_safetensors_has_all_weights(tmp_path):
    model, _, folder = exported(tmp_path, "safetensors", contrast={"loss": "align"})
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_checkpoint_of_the_run(tmp_path):
    make_run(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_00000007"
    assert main(["export", "timm", str(path), str(tmp_path / "encoder.safetensors")]) == 0
    assert metadata(tmp_path / "encoder.safetensors")["ccmim_fast_commit"] == "abc123"


def test_mistakes(tmp_path, capsys):
    make_run(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "there.safetensors").touch()
    run = str(tmp_path / "run")
    for argv, code, words in (
        (["tim", run, "out"], 2, ["'tim'", "nearest: timm"]),
        (["timm", run, "encoder.onnx"], 2, ["FILE.safetensors or a folder"]),
        (["timm", run, str(tmp_path / "full")], 2, ["not empty"]),
        (["timm", run, str(tmp_path / "full" / "file" / "x")], 2, ["cannot be written: Not a directory"]),
        (["timm", run, str(tmp_path / "there.safetensors")], 2, ["exists; remove it, or name another file"]),
        (["timm", str(tmp_path / "full"), "out"], 5, ["no complete checkpoint"]),
    ):
        assert main(["export", *argv]) == code, argv
        (line,) = capsys.readouterr().err.splitlines()
        assert all(word in line for word in words), line
