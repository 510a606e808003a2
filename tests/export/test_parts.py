"""Encoders with parts of their own go to timm and come back: weights bit for bit, tokens within 1e-5."""

import json

import pytest
import timm
import torch
from made_run import make_run
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from tiny import images
from torch import nn

from ccmim_fast.checkpoints.run import open_run
from ccmim_fast.cli import main
from ccmim_fast.config.evaluation import EvalOptimConfig
from ccmim_fast.evaluation.encoders import Encoder, build_encoder, read_encoder
from ccmim_fast.evaluation.finetune import build_optimizer
from ccmim_fast.export.timm_model import rebuilds
from ccmim_fast.models.tokens import tokens_of

NEAR = {"rtol": 0, "atol": 1e-5}
PARTS = {
    "learned": {"positions": "learned"},
    "registers": {"registers": 3},
    "layer_scale": {"layer_scale": 0.1},
    "qk_norm": {"qk_norm": True},
    "swiglu": {"mlp": "swiglu"},
    "all": {"positions": "learned", "registers": 3, "layer_scale": 0.1, "qk_norm": True, "mlp": "swiglu"},
    "distilled": {"arch": "deit_tiny_distilled_patch16_224"},
    "all, registers without positions": {
        "arch": "vit_small_patch14_reg4_dinov2",
        "registers": 2,
        "qk_norm": True,
        "mlp": "swiglu",
    },
    "no gates": {"arch": "vit_giant_patch14_dinov2", "mlp": "gelu"},
    "layer scale beside gates": {"arch": "aimv2_large_patch14_224", "layer_scale": 0.1},
    "an activation that no weight tells": {"arch": "vit_base_patch16_clip_quickgelu_224", "mlp": "gelu"},
}
HEADS = ["--decoder.num_heads=4"]  # what no weight tells


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", PARTS)
def test_round_trip(tmp_path, name):
    model, config = make_run(tmp_path / "run", model=PARTS[name])
    folder = tmp_path / "out"
    assert main(["export", "timm", str(tmp_path / "run"), str(folder)]) == 0
    file, pictures = folder / "model.safetensors", images(2)
    with torch.no_grad():
        expected = tokens_of(model.encoder, model.mean_C, model.std_C)(pictures)
    with safe_open(file, "pt") as opened:
        about = opened.metadata()

    arguments = json.loads(about["timm_arguments"])
    by_arguments = timm.create_model(about["timm_arch"], num_classes=0, **arguments)
    by_arguments.load_state_dict(load_file(file), strict=True)
    by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True)
    mean, std = (torch.tensor(values) for values in (config.data.mean, config.data.std))
    for theirs in (by_arguments, by_folder):
        same(theirs.state_dict(), model.encoder.state_dict())
        with torch.no_grad():
            tokens = theirs.eval().forward_features(((pictures / 255 - mean) / std).permute(0, 3, 1, 2))
        torch.testing.assert_close(tokens, expected, **NEAR)

    for place in (folder, tmp_path / "run"):
        weights = read_encoder(str(place))
        with torch.no_grad():
            evaluated = Encoder(build_encoder(weights, (32, 48)), weights.mean, weights.std).eval()(pictures)
        torch.testing.assert_close(evaluated, expected, **NEAR)

    for place in (file, folder):
        back = tmp_path / f"back-{place.stem}"
        assert main(["import", str(place), "--out", str(back), *HEADS]) == 0
        run = open_run(str(back))
        same(run.model.encoder.state_dict(), model.encoder.state_dict())
        assert run.config.model == config.model
        assert run.model.encoder.pos_embed.requires_grad == (config.model.positions == "learned")


def test_timms_weights_with_parts_come_in(tmp_path):
    """A file of timm's tells its parts by its weights; the initial layer scale is DINOv2's, which no weight tells."""
    made = timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0,
        reg_tokens=2, init_values=0.1, qk_norm=True,
    )  # fmt: skip
    torch.save(made.state_dict(), tmp_path / "vit.pth")
    options = ["--arch", "vit_tiny_patch16_224", "--model.num_heads=3", "--data.image_size=[32,48]", *HEADS]
    assert main(["import", str(tmp_path / "vit.pth"), "--out", str(tmp_path / "run"), *options]) == 0
    run = open_run(str(tmp_path / "run"))
    same(run.model.encoder.state_dict(), made.state_dict())
    model = run.config.model
    assert (model.registers, model.layer_scale, model.qk_norm, model.mlp) == (2, 1e-5, True, "own")


def test_learned_positions_are_resampled_for_images_of_another_size(tmp_path):
    """As timm does; they stay learned, and those of the prefix stay what they are."""
    model, _ = make_run(tmp_path / "run", model={"positions": "learned", "registers": 2})
    file, back = tmp_path / "encoder.safetensors", tmp_path / "back"
    assert main(["export", "timm", str(tmp_path / "run"), str(file)]) == 0
    assert main(["import", str(file), "--out", str(back), "--data.image_size=[16,64]", *HEADS]) == 0
    found, own = open_run(str(back)).model.encoder.pos_embed, model.encoder.pos_embed
    expected = resample_abs_pos_embed(own, new_size=(2, 8), old_size=(4, 6), num_prefix_tokens=3)
    torch.testing.assert_close(found, expected, **NEAR)
    assert found.requires_grad
    assert torch.equal(found[:, :3], own[:, :3])


def test_a_fine_tuned_encoder_has_them(tmp_path):
    """Fine-tuning and its rates by depth: registers and positions with the patch embedding, gamma with its block."""
    make_run(tmp_path / "run", model=PARTS["all"])
    vit = build_encoder(read_encoder(str(tmp_path / "run")), (32, 48), num_classes=5, pool="avg", drop_path=0.1)
    assert vit(torch.zeros(2, 3, 32, 48)).shape == (2, 5)
    optimizer = build_optimizer(vit, EvalOptimConfig(layer_decay=0.5, weight_decay=0.05))
    of = {
        id(p): (group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    found = {name: of[id(parameter)] for name, parameter in vit.named_parameters()}
    first = 0.5 ** (len(vit.blocks) + 1)
    assert found["reg_token"] == found["pos_embed"] == found["cls_token"] == (first, 0.0)
    assert found["patch_embed.proj.weight"] == (first, 0.05)
    assert found["blocks.0.ls1.gamma"] == found["blocks.0.attn.q_norm.weight"] == (2 * first, 0.0)
    assert found["blocks.0.mlp.fc1.weight"] == (2 * first, 0.05)
    assert found["head.weight"] == (1.0, 0.05)


def test_a_distilled_encoder_is_fine_tuned_from_its_two_tokens_or_its_patches(tmp_path):
    make_run(tmp_path / "run", model=PARTS["distilled"])
    weights = read_encoder(str(tmp_path / "run"))
    vit = build_encoder(weights, (32, 48), num_classes=5, pool="cls")
    assert vit(torch.zeros(2, 3, 32, 48)).shape == (2, 5)
    assert build_encoder(weights, (32, 48), num_classes=5, pool="avg")(torch.zeros(2, 3, 32, 48)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("learned", ""),
        ("layer_scale", ""),
        ("registers", "reg_token"),
        ("qk_norm", "q_norm"),
        ("swiglu", "GELU"),
        ("distilled", "dist_token"),
    ],
)
def test_transformers_takes_them_or_a_line_says_why(tmp_path, capsys, name, words):
    make_run(tmp_path / "run", model=PARTS[name])
    code = main(["export", "hf-vit", str(tmp_path / "run"), str(tmp_path / "out")])
    assert code == (2 if words else 0)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arch", "mlp"),
    [
        ("beit3_base_patch16_224", "swiglu"),
        ("vit_base_patch16_18x2_224", "swiglu"),
        ("aimv2_large_patch14_224", "gelu"),
    ],
)
def test_timm_has_no_name_for_some(tmp_path, capsys, arch, mlp):
    """Norms within attention, two attentions side by side, RMSNorm: they are evaluated all the same."""
    model, _ = make_run(tmp_path / "run", model={"arch": arch, "depth": 2, "mlp": mlp})
    assert main(["export", "timm", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert f"timm has no arguments that build {arch} with these settings" in capsys.readouterr().err
    assert main(["export", "safetensors", str(tmp_path / "run"), str(tmp_path / "own.safetensors")]) == 0
    pictures = images(2)
    for place in ("run", "own.safetensors"):
        weights = read_encoder(str(tmp_path / place))
        with torch.no_grad():
            evaluated = Encoder(build_encoder(weights, (32, 48)), weights.mean, weights.std).eval()(pictures)
            expected = tokens_of(model.encoder, model.mean_C, model.std_C)(pictures)
        torch.testing.assert_close(evaluated, expected, **NEAR)


def test_timms_gelu_is_torchs():
    """timm's class of the name "gelu" prints itself otherwise; tanh's form is another function."""
    arch, sizes = "vit_base_patch16_clip_quickgelu_224", {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3}
    vit = timm.create_model(arch, act_layer=nn.GELU, **sizes)
    assert rebuilds(vit, arch, {"act_layer": "gelu", **sizes})
    assert not rebuilds(vit, arch, {"act_layer": "gelu_tanh", **sizes})
    assert not rebuilds(vit, arch, sizes)
