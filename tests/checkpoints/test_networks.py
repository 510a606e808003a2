"""Of several networks in one file that is taken which its authors evaluate, however containers and prefixes name it."""

import argparse

import pytest
import timm
import torch
from timm.utils import CheckpointSaver, ModelEmaV3

from ccmim_fast.checkpoints.published import read_weights

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}


def vit():
    return timm.create_model("vit_tiny_patch16_224", **SIZES)


def beside(first, second):
    """Return a dictionary of two networks: under prefixes that end in a dot, else in containers."""
    made, networks = {}, (vit().state_dict(), vit().state_dict())
    for name, weights in zip((first, second), networks):
        made |= {f"{name}{key}": value for key, value in weights.items()} if name.endswith(".") else {name: weights}
    return made, networks


@pytest.mark.parametrize(
    ("taken", "other"),
    [
        ("state_dict_ema", "state_dict"),
        ("ema_state_dict", "state_dict"),
        ("ema_model_state_dict", "model_state_dict"),
        ("modelEMA", "model"),
        ("averaged_model", "model"),
        ("student_ema", "teacher"),
        ("teacher", "student"),
        ("model", "student"),
        ("model_state_dict", "optimizer_state"),
        ("ema_model.", "model."),
        ("averaged_model.module.", "model."),
        ("teacher_backbone.", "backbone."),
        ("teacher_backbone.", "student_backbone."),
        ("target_encoder.", "encoder."),
        ("backbone_momentum.", "backbone."),
        ("momentum_backbone.", "backbone."),
        ("module.base_encoder.", "module.momentum_encoder."),
        ("backbone.", "student_backbone."),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_network_that_is_evaluated(tmp_path, taken, other, turned):
    made, networks = beside(*((other, taken) if turned else (taken, other)))
    torch.save({"epoch": 3, "nested": made} if taken.endswith(".") else made, tmp_path / "w.pth")
    found = read_weights(str(tmp_path / "w.pth"))
    assert taken.rstrip(".") in found.layout
    expected = networks[turned]["patch_embed.proj.weight"]
    assert torch.equal(found.tensors["encoder.patch_embed.proj.weight"], expected)


def test_timms_own_checkpoint_of_training(tmp_path):
    """CheckpointSaver puts `state_dict_ema` beside `state_dict`."""
    model, averaged = vit(), vit()
    options = {"args": argparse.Namespace(model="x"), "model_ema": ModelEmaV3(averaged)}
    folders = {"checkpoint_dir": str(tmp_path), "recovery_dir": str(tmp_path)}
    CheckpointSaver(model, torch.optim.SGD(model.parameters(), 0.1), **options, **folders).save_checkpoint(0, metric=1)
    found = read_weights(str(tmp_path / "last.pth.tar")).tensors
    assert all(torch.equal(found[f"encoder.{name}"], value) for name, value in averaged.state_dict().items())


def test_a_container_in_itself(tmp_path):
    """Pickles may hold such; each container is looked at once."""
    made = {"model": vit().state_dict()}
    made |= {f"again_{number}": made for number in range(100)}
    torch.save(made, tmp_path / "w.pth")
    assert read_weights(str(tmp_path / "w.pth")).layout.endswith("'model'")
