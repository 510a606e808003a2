"""What a frozen encoder gives of an image: [CLS] or the patches' mean, behind which norm."""

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from ccmim_fast.checkpoints.published import Weights
from ccmim_fast.config.evaluation import EvalConfig, EvalDataConfig, EvalModelConfig
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.encoders import build_encoder
from ccmim_fast.evaluation.frozen.features import pooled
from ccmim_fast.evaluation.job import Job

ARCH, SIZES = "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def made(arch=ARCH, **options):
    """A ViT whose norms are far from new ones, and its weights as a checkpoint tells them."""
    vit = timm.create_model(arch, num_classes=0, **SIZES, **options).eval()
    for name, parameter in vit.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.5)
    return vit, Weights("w", dict(vit.state_dict()), arch, 3, MEAN, STD, image_size=(32, 32))


def features(weights, images_BHWC, **model):
    """As the probes and kNN compute them."""
    config = EvalConfig(model=EvalModelConfig(**model), data=EvalDataConfig(image_size=(32, 32)))
    encoder = Job(config, SimpleNamespace(device=torch.device("cpu")), None, weights, None, None).frozen_encoder()
    return encoder.norm(pooled(encoder(images_BHWC), encoder.prefix, config.model.pool))


def standardised(x_BD):
    """A new LayerNorm, in float64; eps 1e-6 as in MAE's ViT."""
    x_BD = x_BD.double()
    centred_BD = x_BD - x_BD.mean(1, keepdim=True)
    return centred_BD / (centred_BD.square().mean(1, keepdim=True) + 1e-6).sqrt()


def test_pooling_and_its_norm():
    vit, weights = made()
    images_BHWC = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    pixels_BCHW = ((images_BHWC / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    with torch.no_grad():
        normed_BTD = vit.forward_features(pixels_BCHW)
        vit.norm = nn.Identity()
        bare_BTD = vit.forward_features(pixels_BCHW)
        found = [features(weights, images_BHWC, **of) for of in ({"pool": "cls"}, {"pool": "avg"}, {"fc_norm": False})]
    expected = [normed_BTD[:, 0], standardised(bare_BTD[:, 1:].mean(1)), normed_BTD[:, 1:].mean(1)]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=1e-5)


def test_a_norm_that_was_trained_behind_the_pooling_stays():
    """Of a fine-tuned classifier: whatever is asked for, its norm is the one that it has."""
    vit, weights = made(global_pool="avg", fc_norm=True)
    images_BHWC = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    pixels_BCHW = ((images_BHWC / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = vit.forward_head(vit.forward_features(pixels_BCHW), pre_logits=True)
        for fc_norm in (True, False):
            torch.testing.assert_close(features(weights, images_BHWC, fc_norm=fc_norm), expected)


def test_patches_of_a_distilled_deit_are_averaged():
    """timm's class pools its two tokens alone: neither of them is among the patches."""
    vit, weights = made("deit_tiny_distilled_patch16_224")
    images_BHWC = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    pixels_BCHW = ((images_BHWC / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    with torch.no_grad():
        normed_BTD = vit.forward_features(pixels_BCHW)
        vit.norm = nn.Identity()
        expected_BD = vit.forward_features(pixels_BCHW)[:, 2:].mean(1)
        found_BD = features(weights, images_BHWC, pool="avg")
        torch.testing.assert_close(found_BD.double(), standardised(expected_BD), rtol=0, atol=1e-5)
        torch.testing.assert_close(features(weights, images_BHWC, fc_norm=False), normed_BTD[:, 2:].mean(1))


def test_registers_are_no_cls():
    _, weights = made("vit_wee_patch16_reg1_gap_256")
    with pytest.raises(ConfigError, match=r"model\.pool=cls: vit_wee.* has no \[CLS\] token; nearest valid is avg"):
        features(weights, torch.zeros(1, 32, 32, 3, dtype=torch.uint8), pool="cls")


@pytest.mark.parametrize("fc_norm", [True, False])
def test_a_fine_tuned_norm_stands_where_it_is_asked_for(fc_norm):
    _, weights = made()
    vit = build_encoder(weights, (32, 32), num_classes=4, pool="avg", fc_norm=fc_norm)
    assert isinstance(vit.norm, nn.Identity) == fc_norm
    kept = weights.tensors["norm.weight"]
    assert torch.equal(vit.fc_norm.weight, torch.ones(48)) if fc_norm else torch.equal(vit.norm.weight, kept)
