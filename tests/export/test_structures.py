"""Every target gives an encoder's tokens, whatever the encoder is built of, or says in words why it cannot."""

import functools
import json

import pytest
import timm
import torch
from made_run import make_run
from safetensors.torch import load_file
from tiny import images

from ccmim_fast.checkpoints.published import read_weights
from ccmim_fast.cli import main
from ccmim_fast.evaluation.encoders import Tokens, build_encoder, read_encoder
from ccmim_fast.models.tokens import tokens_of

NEAR = {"rtol": 0, "atol": 1e-5}
STANDARD = "blocks that are not timm's standard one"
# What is special -> sections of the settings beside `SMALL`, and what transformers cannot express; "": it can.
STRUCTURES = {
    "nothing": ({}, ""),
    "oblong images": ({"data": {"image_size": (32, 48)}}, ""),
    "narrow heads": ({"model": {"num_heads": 12}}, ""),
    "two channels": ({"data": {"channels": 2, "mean": (0.4, 0.5), "std": (0.2, 0.3)}}, ""),
    "layer scale, no position of [CLS]": ({"model": {"arch": "deit3_small_patch16_224"}}, ""),
    "no bias of queries": ({"model": {"arch": "vit_base_patch16_224_miil"}}, ""),
    "no bias of queries, layer scale": ({"model": {"arch": "vit_medium_patch16_gap_240"}}, ""),
    "registers": ({"model": {"arch": "vit_medium_patch16_reg4_gap_256"}}, "the weights reg_token"),
    "registers with positions": ({"model": {"arch": "vit_so150m_patch16_reg4_gap_256"}}, "the weights reg_token"),
    "a norm before the blocks": ({"model": {"arch": "vit_base_patch16_clip_224"}}, "norm_pre.weight"),
    "quick GELU": ({"model": {"arch": "vit_base_patch16_clip_quickgelu_224"}}, "an activation other than GELU"),
    "tanh in GELU": ({"model": {"arch": "vit_base_patch32_siglip_256"}}, "an activation other than GELU"),
    "packed gates": ({"model": {"arch": "vit_giant_patch14_dinov2"}}, "an MLP with gates"),
    "gates, RMSNorm": ({"model": {"arch": "aimv2_large_patch14_224"}}, "blocks.*.mlp.fc1_g.weight"),
    "no final norm": ({"model": {"arch": "vit_intern300m_patch14_448"}}, "an encoder without norm.bias, norm.weight"),
    "no final norm, registers": ({"model": {"arch": "vit_base_patch16_radio_v3"}}, "an encoder without norm.bias"),
    "norms in attention and MLP": ({"model": {"arch": "beit3_base_patch16_224"}}, "blocks.*.attn.norm.bias"),
    "differential attention": ({"model": {"arch": "vit_dwee_patch16_reg1_gap_256"}}, STANDARD),
    "parallel blocks": ({"model": {"arch": "vit_base_patch16_xp_224"}}, STANDARD),
    "two attentions in a block": ({"model": {"arch": "vit_small_patch16_18x2_224"}}, STANDARD),
    "norms behind": ({"model": {"arch": "vit_base_patch16_rpn_224"}}, STANDARD),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(name)` -> folder of a run, its model, pixels as other libraries take them, the pictures, our tokens."""

    @functools.cache
    def make(name):
        sections, folder = STRUCTURES[name][0], tmp_path_factory.mktemp("run")
        small = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
        data = {"image_size": (32, 32)} | sections.get("data", {})
        model, config = make_run(folder, data=data, model=small | sections.get("model", {}))
        pictures = images(2, config.data.image_size, config.data.channels)
        with torch.no_grad():
            tokens = tokens_of(model.encoder, model.mean_C, model.std_C)(pictures)
        mean, std = (torch.tensor(values) for values in (config.data.mean, config.data.std))
        return str(folder), model, ((pictures / 255 - mean) / std).permute(0, 3, 1, 2), pictures, tokens

    return make


@pytest.mark.parametrize("name", STRUCTURES)
def test_timm_and_graphs_give_the_tokens(made, tmp_path, name):
    """timm from a folder, strictly; the module that ONNX and torch.export trace; and an evaluation of the export."""
    run, model, pixels, pictures, tokens = made(name)
    assert main(["export", "timm", run, str(tmp_path / "out")]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(weights[key], value) for key, value in model.encoder.state_dict().items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    vit = timm.create_model(config["architecture"], num_classes=0, **config["model_args"]).eval()
    vit.load_state_dict(weights)
    traced = Tokens(model.encoder, model.mean_C.tolist(), model.std_C.tolist())
    read = build_encoder(read_encoder(str(tmp_path / "out")), tuple(pixels.shape[2:])).eval()
    with torch.no_grad():
        torch.testing.assert_close(vit.forward_features(pixels), tokens, **NEAR)
        torch.testing.assert_close(traced(pictures.permute(0, 3, 1, 2) / 255), tokens, **NEAR)
        torch.testing.assert_close(read.forward_features(pixels), tokens, **NEAR)


@pytest.mark.parametrize("name", ["oblong images", "registers", "registers with positions", "no final norm"])
@pytest.mark.parametrize("target", ["safetensors", "timm"])
def test_what_is_exported_comes_back(made, tmp_path, target, name):
    """Imported, bit for bit."""
    run, model, *_ = made(name)
    file, out = tmp_path / "weights.safetensors", tmp_path / "back"
    assert main(["export", target, run, str(file)]) == 0
    more = [] if target == "safetensors" else ["--decoder.dim=16", "--decoder.depth=1"]  # which starts anew
    assert main(["import", str(file), f"--out={out}", "--decoder.num_heads=4", "--heads.dim=16", *more]) == 0
    found, part = read_weights(str(out)).tensors, "" if target == "safetensors" else "encoder."
    expected = {key: value for key, value in model.state_dict().items() if key.startswith(part)}
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, (_, words) in STRUCTURES.items() if words])
def test_what_transformers_cannot_express_is_refused(made, tmp_path, capsys, name, words):
    run = made(name)[0]
    for target in ("hf-vit", "hf-vitmae") if name.startswith("no final norm") else ("hf-vit",):
        assert main(["export", target, run, str(tmp_path / "out")]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"{target}: cannot express " in line
        assert words in line
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name, (_, words) in STRUCTURES.items() if not words])
def test_transformers_gives_the_tokens_and_they_come_back(made, tmp_path, capsys, name):
    transformers = pytest.importorskip("transformers")
    run, model, pixels, _, tokens = made(name)
    for target, kind in (("hf-vit", "ViTModel"), ("hf-vitmae", "ViTMAEModel")):
        out = tmp_path / target
        code = main(["export", target, run, str(out)])
        if target == "hf-vitmae" and (name == "oblong images" or name.startswith("no bias")):
            assert code == 2
            assert "hf-vitmae: cannot express " in capsys.readouterr().err.splitlines()[-1]
            continue
        assert code == 0
        options = {"add_pooling_layer": False} if target == "hf-vit" else {"mask_ratio": 0.0}
        theirs = getattr(transformers, kind).from_pretrained(out, **options).eval()
        # Without a mask ViTMAE shuffles its patches all the same.
        noise = {} if target == "hf-vit" else {"noise": torch.arange(16.0).expand(2, 16)}
        with torch.no_grad():
            torch.testing.assert_close(theirs(pixel_values=pixels, **noise).last_hidden_state, tokens, **NEAR)
            for place in (out, out / "model.safetensors"):
                read = build_encoder(read_encoder(str(place)), tuple(pixels.shape[2:])).eval()
                torch.testing.assert_close(read.forward_features(pixels), tokens, **NEAR)
        if "layer scale" in name:  # which is in other weights now
            continue
        theirs.save_pretrained(tmp_path / f"{target}-theirs")
        found, own = (
            read_encoder(str(tmp_path / f"{target}-theirs"), model_arch(name)).tensors,
            model.encoder.state_dict(),
        )
        assert found.keys() == own.keys()
        assert all(torch.equal(found[key], value) for key, value in own.items())


def test_a_file_for_transformers_is_imported_without_its_layer_scale(made, tmp_path):
    """Which is in other weights there; and a position of [CLS] is in [CLS]."""
    run, _, pixels, _, tokens = made("layer scale, no position of [CLS]")
    assert main(["export", "hf-vitmae", run, str(tmp_path / "out")]) == 0
    more = ["--decoder.num_heads=4", "--heads.dim=16"]
    assert main(["import", str(tmp_path / "out"), f"--out={tmp_path / 'back'}", *more]) == 0
    back = build_encoder(read_encoder(str(tmp_path / "back")), (32, 32)).eval()
    with torch.no_grad():
        torch.testing.assert_close(back.forward_features(pixels), tokens, **NEAR)


def model_arch(name):
    return STRUCTURES[name][0].get("model", {}).get("arch", "vit_tiny_patch16_224")
