"""Runs of timm's Eva family go to timm and back: the same weights, the same tokens."""

import dataclasses
import json

import pytest
import timm
import torch
from made_run import make_run
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import images

from ccmim_fast.checkpoints.published import read_weights
from ccmim_fast.checkpoints.run import open_run
from ccmim_fast.cli import main
from ccmim_fast.evaluation.classifier import open_classifier
from ccmim_fast.evaluation.encoders import build_encoder, read_encoder
from ccmim_fast.models.tokens import tokens_of

NEAR = {"rtol": 0, "atol": 1e-5}
MODELS = {
    "eva02_small_patch14_224": {"arch": "eva02_small_patch14_224"},
    "dinov3": {"arch": "vit_small_patch16_dinov3_qkvb"},
    "learned frequencies": {"arch": "vit_base_patch16_rope_mixed_224"},
    "few keys": {"arch": "vit_large_patch16_sapiens2", "depth": 17, "num_heads": 4, "embed_dim": 64},
    "a plain one with rotations": {"positions": "rope"},
    "its rotations alone": {"arch": "eva02_small_patch14_224", "positions": "rope"},
    "new rotations alone, parts of its own": {
        "arch": "eva_giant_patch14_224",
        "positions": "rope",
        "registers": 2,
        "layer_scale": 0.1,
        "qk_norm": True,
    },
    "with parts of its own": {
        "positions": "rope",
        "registers": 2,
        "layer_scale": 0.1,
        "qk_norm": True,
        "mlp": "swiglu",
        "drop_path": 0.1,
    },
}


def normalised(pictures, config):
    mean, std = (torch.tensor(values) for values in (config.data.mean, config.data.std))
    return ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", MODELS)
def test_to_timm_and_back(tmp_path, kind):
    if not timm.is_model(MODELS[kind].get("arch", "vit_tiny_patch16_224")):
        pytest.skip("an older timm")
    model, config = make_run(tmp_path / "run", model=MODELS[kind])
    assert main(["export", "timm", str(tmp_path / "run"), str(tmp_path / "timm")]) == 0
    weights = load_file(tmp_path / "timm" / "model.safetensors")
    assert weights.keys() == model.encoder.state_dict().keys()
    target = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    pictures = images()
    with torch.no_grad():
        expected = tokens_of(model.encoder, model.mean_C, model.std_C)(pictures)
        torch.testing.assert_close(target.forward_features(normalised(pictures, config)), expected, **NEAR)
        with safe_open(tmp_path / "timm" / "model.safetensors", "pt") as file:
            about = file.metadata()
        by_file = timm.create_model(about["timm_arch"], num_classes=0, **json.loads(about["timm_arguments"]))
        by_file.load_state_dict(weights)
        for place in ("run", "timm", "timm/model.safetensors"):
            vit = build_encoder(read_encoder(str(tmp_path / place)), (32, 48)).eval()
            torch.testing.assert_close(vit.forward_features(normalised(pictures, config)), expected, **NEAR)
    assert main(["import", str(tmp_path / "timm"), f"--out={tmp_path / 'back'}"]) == 0
    back = {k: v for k, v in read_weights(str(tmp_path / "back")).tensors.items() if k.startswith("encoder.")}
    own = {k: v for k, v in model.state_dict().items() if k.startswith("encoder.")}
    torch.testing.assert_close(back, own, rtol=0, atol=0)
    assert (
        dataclasses.replace(open_run(str(tmp_path / "back")).config.model, drop_path=config.model.drop_path)
        == config.model
    )


@pytest.mark.parametrize("pool", ["avg", "cls"])
@pytest.mark.parametrize("kind", ["dinov3", "learned frequencies", "a plain one with rotations", "its rotations alone"])
def test_a_fine_tuned_classifier(tmp_path, capsys, kind, pool):
    """To timm, which needs nothing but the folder, and read again; in words for transformers."""
    make_run(tmp_path / "run", model=MODELS[kind] | {"layer_scale": 0.1})
    images_of = ["--data.source=shapes", f"--data.root={tmp_path / 'shapes'}", "--data.samples=12", "--data.classes=3"]
    images_of += ["--data.test_samples=6", "--data.image_size=[32,48]", "--train.device=cpu", "--train.precision=fp32"]
    short = ["--train.epochs=1", "--train.batch_size=6", "--optim.warmup_epochs=0", "--data.workers=1"]
    where = f"--run.dir={tmp_path / 'tuned'}"
    assert main(["eval", "finetune", str(tmp_path / "run"), *images_of, *short, where, f"--model.pool={pool}"]) == 0
    assert main(["export", "timm", str(tmp_path / "tuned"), str(tmp_path / "timm")]) == 0
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 32, 48)
    for place in ("tuned", "timm"):
        ours = open_classifier(str(tmp_path / place)).vit
        torch.testing.assert_close(ours(pixels), theirs(pixels), **NEAR)
    capsys.readouterr()
    assert main(["export", "hf-vit", str(tmp_path / "tuned"), str(tmp_path / "hf")]) == 2
    assert "cannot express blocks that are not timm's standard one" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["hf-vit", "hf-vitmae"])
def test_what_transformers_vit_cannot_express(tmp_path, capsys, target):
    make_run(tmp_path / "run", model=MODELS["dinov3"])
    assert main(["export", target, str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot express blocks that are not timm's standard one; take timm, onnx or torch-export" in line


@pytest.mark.slow
def test_torch_export_gives_our_features(tmp_path):
    model, _ = make_run(tmp_path / "run", model=MODELS["dinov3"])
    assert main(["export", "torch-export", str(tmp_path / "run"), str(tmp_path / "encoder.pt2")]) == 0
    program, pictures = torch.export.load(tmp_path / "encoder.pt2").module(), images(3)
    with torch.no_grad():
        expected = tokens_of(model.encoder, model.mean_C, model.std_C)(pictures)
    torch.testing.assert_close(program(pictures.permute(0, 3, 1, 2).float() / 255), expected, **NEAR)


@pytest.mark.slow
def test_onnx_runtime_gives_our_features(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, _ = make_run(tmp_path / "run", model=MODELS["learned frequencies"])
    assert main(["export", "onnx", str(tmp_path / "run"), str(tmp_path / "encoder.onnx")]) == 0
    session = runtime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    pictures = images(3)
    (tokens,) = session.run(["tokens"], {"images": (pictures.permute(0, 3, 1, 2).float() / 255).numpy()})
    with torch.no_grad():
        expected = tokens_of(model.encoder, model.mean_C, model.std_C)(pictures)
    torch.testing.assert_close(torch.from_numpy(tokens), expected, **NEAR)
