"""Classifiers of other encoders than a plain ViT: fine-tuned or probed, each export gives their logits again."""

import json
import re

import pytest
import timm
import torch
from made_run import make_run
from safetensors.torch import save_file

from ccmim_fast.checkpoints import io
from ccmim_fast.cli import main
from ccmim_fast.commands.eval import evaluate
from ccmim_fast.evaluation.classifier import open_classifier

SIDE = 32  # as the fixtures'
NEAR = {"rtol": 0, "atol": 1e-5}


def pixels():
    """Four images, normalised."""
    mean, std = (torch.tensor(values) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((torch.randint(0, 256, (4, SIDE, SIDE, 3)) / 255 - mean) / std).permute(0, 3, 1, 2)


def fine_tuned(folder, model, pool):
    """Fine-tunes a small encoder for two steps; returns the folder of the evaluation."""
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    make_run(folder / "run", data={"image_size": (32, 32)}, model=sizes | model)
    what = ["--data.source=shapes", f"--data.root={folder / 'cache'}", "--data.samples=24", "--data.test_samples=12"]
    what += ["--data.classes=3", "--data.image_size=[32,32]", "--data.test_crop=1", "--train.batch_size=12"]
    what += ["--train.epochs=1", "--optim.warmup_epochs=0", "--train.device=cpu", "--train.precision=fp32"]
    what += ["--data.workers=1", f"--model.pool={pool}"]
    assert main(["eval", "finetune", str(folder / "run"), *what]) == 0
    return folder / "run" / "eval" / "finetune"


@pytest.fixture
def trained_probe(cache, shared_settings, tmp_path):
    """`trained_probe(arch, pool)` -> the folder of a linear probe, and timm's encoder; `norm`: name of its last one."""

    def train(arch, pool, norm="norm"):
        sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 0}
        vit = timm.create_model(arch, **sizes).eval()
        with torch.no_grad():
            for part in vit.parameters():
                part += 0.1 * torch.randn_like(part)
        weights = {re.sub("^norm", norm, name): value for name, value in vit.state_dict().items()}
        save_file(weights, tmp_path / "vit.safetensors", {"timm_arguments": json.dumps({"img_size": [SIDE, SIDE]})})
        run = tmp_path / "probe"
        what = [f"--data.root={cache}", f"--run.dir={run}", f"--model.arch={arch}", "--model.num_heads=3"]
        settings = [s for s in shared_settings if not s.startswith("--model.arch")]
        what += ["--train.batch_size=100", "--train.epochs=1", "--optim.warmup_epochs=0", "--optim.base_lr=100"]
        what += [f"--model.pool={pool}", "--model.fc_norm=false"]
        evaluate(["linear", str(tmp_path / "vit.safetensors"), *settings, *what])
        return run, vit

    return train


def by_hand(run, features_BD):
    """The logits of the one head of a linear probe."""
    weights = io.newest(run / "checkpoints").state["model"]
    normed_BD = (features_BD - weights["norm.running_mean"]) / (weights["norm.running_var"] + 1e-6).sqrt()
    return normed_BD @ weights["linears.0.weight"].T + weights["linears.0.bias"]


@pytest.mark.parametrize(
    "model",
    [
        {"arch": "eva02_tiny_patch14_224"},
        {"arch": "vit_small_patch16_dinov3"},
        {"arch": "deit3_small_patch16_224"},
        {"arch": "deit_tiny_distilled_patch16_224"},
        {"arch": "vit_base_patch16_xp_224"},
        {"arch": "vit_tiny_patch16_224", "positions": "rope"},
        {"arch": "vit_tiny_patch16_224", "registers": 2, "mlp": "swiglu", "layer_scale": 0.1, "qk_norm": True},
    ],
)
def test_classifiers_of_other_encoders(tmp_path, model):
    """Rotary positions, registers, layer scale, gates: the same function by timm, and from each export."""
    check_exports(fine_tuned(tmp_path, model, "avg"), tmp_path)


def test_a_distilled_classifier_keeps_both_heads(tmp_path, capsys):
    check_exports(fine_tuned(tmp_path, {"arch": "deit_tiny_distilled_patch16_224"}, "cls"), tmp_path)
    other = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7)
    assert (len(other.head.weight), len(other.head_dist.weight)) == (7, 7), "heads for other classes start anew"
    assert "| pooling | [CLS] and the distillation token |" in (tmp_path / "out" / "README.md").read_text()
    assert main(["export", "hf-vit", str(tmp_path / "run" / "eval" / "finetune"), str(tmp_path / "hf")]) == 2
    assert "cannot express a VisionTransformerDistilled, the weights dist_token; " in capsys.readouterr().err


def check_exports(run, tmp_path):
    """The weights are those that were trained; timm's module of the export gives the logits of each way to open it."""
    assert main(["export", "timm", str(run), str(tmp_path / "out")]) == 0
    vit, images = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval(), pixels()
    opened, trained = open_classifier(str(run)).vit.state_dict(), io.newest(run / "checkpoints").state["model"]
    assert opened.keys() == trained.keys()
    assert all(torch.equal(opened[name], value) for name, value in trained.items())
    assert main(["export", "safetensors", str(run), str(tmp_path / "ours.safetensors")]) == 0
    with torch.no_grad():
        expected = vit(images)
        for place in (run, tmp_path / "out", tmp_path / "ours.safetensors"):
            torch.testing.assert_close(open_classifier(str(place)).vit(images), expected, **NEAR)


@pytest.mark.parametrize("pool", ["cls", "avg"])
@pytest.mark.parametrize("arch", ["deit3_small_patch16_224", "vit_small_patch14_dinov2"])
def test_transformers_files_predict_without_their_layer_scale(tmp_path, arch, pool):
    """It is in other weights there; and the first has no position of [CLS]."""
    run, images = fine_tuned(tmp_path, {"arch": arch}, pool), pixels()
    assert main(["export", "hf-vit", str(run), str(tmp_path / "out")]) == 0
    with torch.no_grad():
        expected = open_classifier(str(run)).vit(images)
        torch.testing.assert_close(open_classifier(str(tmp_path / "out")).vit(images), expected, **NEAR)


@pytest.mark.parametrize(
    "arch", ["vit_base_patch16_xp_224", "vit_base_patch16_18x2_224", "vit_dpwee_patch16_reg1_gap_256"]
)
def test_an_attentive_probe_has_the_heads_of_any_block(evaluated, tmp_path, arch):
    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 0}
    told = {"timm_arguments": json.dumps({"img_size": [SIDE, SIDE]})}
    save_file(timm.create_model(arch, **sizes).state_dict(), tmp_path / "vit.safetensors", told)
    short = ["--train.batch_size=100", "--train.epochs=1", "--optim.warmup_epochs=0"]
    asked = [f"--model.arch={arch}", "--model.num_heads=3", *short]
    assert evaluated("attentive", *asked, checkpoint=tmp_path / "vit.safetensors")["arch"] == arch


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_a_probe_of_a_distilled_encoder_has_one_head(trained_probe, tmp_path, pool):
    """timm's class of a distilled DeiT would average its logits with those of a second one."""
    run, vit = trained_probe("deit_tiny_distilled_patch16_224", pool)
    images = pixels()
    with torch.no_grad():
        tokens = vit.forward_features(images)
        expected = by_hand(run, tokens[:, 0] if pool == "cls" else tokens[:, 2:].mean(1))
        torch.testing.assert_close(open_classifier(str(run)).vit(images), expected, **NEAR)
        for target, out in (("timm", "out"), ("safetensors", "ours.safetensors")):
            assert main(["export", target, str(run), str(tmp_path / out)]) == 0
            found = open_classifier(str(tmp_path / out)).vit(images)
            torch.testing.assert_close(found, expected, **NEAR)
        theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        torch.testing.assert_close(theirs(images), expected, **NEAR)


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_a_probe_whose_norm_stands_behind_pooling(trained_probe, tmp_path, pool):
    """A norm of [CLS] alone is one of every token, as transformers' ViT has it; one of the mean is BEiT's."""
    transformers = pytest.importorskip("transformers")
    run, vit = trained_probe("vit_tiny_patch16_224", pool, "fc_norm")
    images, norm, vit.norm = pixels(), vit.norm, torch.nn.Identity()
    assert main(["export", "hf-vit", str(run), str(tmp_path / "out")]) == 0
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        tokens = vit.forward_features(images)
        expected = by_hand(run, norm(tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)))
        torch.testing.assert_close(model(pixel_values=images).logits, expected, **NEAR)
        torch.testing.assert_close(open_classifier(str(tmp_path / "out")).vit(images), expected, **NEAR)
