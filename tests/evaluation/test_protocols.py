"""Whose encoder the figures of a preset are of."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ccmim_fast.checkpoints.published import Weights
from ccmim_fast.config.load import presets
from ccmim_fast.config.schema import DataConfig
from ccmim_fast.evaluation.encoders import IMAGENET, read_encoder
from ccmim_fast.evaluation.images import Images
from ccmim_fast.evaluation.protocols import deviations, protocol
from ccmim_fast.evaluation.registry import EVALUATIONS

OWN = {"ViT-B/16": (768, 16), "ViT-L/16": (1024, 16), "ViT-H/14": (1280, 14)}
PRESETS = {
    "finetune": "ViT-B/16",
    "finetune_large": "ViT-L/16",
    "finetune_huge": "ViT-H/14",
    "finetune_ccmim": "ViT-B/16",
    "detection": "ViT-B/16",
    "detection_vitdet": "ViT-B/16",
    "segmentation": "ViT-B/16",
    "segmentation_cae": "ViT-B/16",
}


class Counted(SimpleNamespace):
    """So many images of so many classes."""

    excluded_X = ()

    def __len__(self):
        return self.count


def found(name, weights, config=None):
    """Deviations of a run that keeps all of the preset's images and, without other settings, figures."""
    of = protocol(next(one for one in EVALUATIONS if name.startswith(one)), name)
    *counts, classes = of.images or (2, 2, 2)
    train, test = (Images(Counted(count=count, class_names=range(classes)), DataConfig()) for count in counts)
    return deviations(of, SimpleNamespace(config=config or of.config, weights=weights, train=train, test=test))


@pytest.mark.parametrize("side", [224, 384])
def test_a_larger_image_that_is_shown_whole_is_the_protocols(side):
    """MAE fine-tunes at 224 pixels, and shows all of a larger test image."""
    of = protocol("finetune")
    size = replace(of.config.data, image_size=(side, side))
    for test_crop, expected in ((0.875, side > 224), (1.0, side == 224)):
        config = replace(of.config, data=replace(size, test_crop=test_crop))
        words = " ".join(found("finetune", of_size(768, 16), config))
        assert ("data.test_crop" in words) == expected
        assert ("data.image_size" in words) == (side == 384)


def test_figures_of_another_unit_are_not_the_protocols():
    of = protocol("segmentation")
    optim = replace(of.config.optim, warmup_steps=0, warmup_epochs=0.0)
    without = replace(of.config, optim=optim, train=replace(of.config.train, epochs=7))
    assert found("segmentation", of_size(768, 16), without) == ["optim.warmup_epochs: 0.0 (optim.warmup_steps: 1500)"]
    shorter = replace(of.config, train=replace(of.config.train, steps=0, epochs=7))
    assert found("segmentation", of_size(768, 16), shorter) == ["train.epochs: 7 (train.steps: 160000)"]
    steps = replace(of.config, train=replace(of.config.train, steps=100))
    assert found("segmentation", of_size(768, 16), steps) == ["train.steps: 100 (160000)"]


def of_size(width, patch):
    tensors = {
        "patch_embed.proj.weight": torch.zeros(width, 3, patch, patch),
        "blocks.0.norm1.weight": torch.zeros(width),
    }
    return Weights("a.pth", tensors, "x", 0, *IMAGENET)


@pytest.mark.parametrize("name", PRESETS)
def test_figures_are_of_one_encoder(name):
    own = PRESETS[name]
    assert found(name, of_size(*OWN[own])) == []
    for width, patch in {(384, 16), (768, 8), *OWN.values()} - {OWN[own]}:
        assert found(name, of_size(width, patch)) == [f"encoder: width {width}, patch {patch} ({own})"]


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("vit_base_patch16_224", []),
        ("vit_small_patch32_224", ["encoder: width 384, patch 32 (ViT-B/16)"]),
        ("xcit_nano_12_p8_224", ["encoder: width 128, patch 8 (ViT-B/16)"]),
        ("mvitv2_tiny", ["encoder: width 768, patch 0 (ViT-B/16)"]),
    ],
)
def test_initial_weights_have_an_encoder_too(arch, expected):
    assert found("finetune", read_encoder(f"timm:{arch}")) == expected


@pytest.mark.parametrize("name", [name for name in presets("eval") if name not in PRESETS])
def test_other_figures_are_of_any_encoder(name):
    assert found(name, of_size(384, 8)) == []
