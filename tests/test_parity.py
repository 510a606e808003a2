"""What MAE's repository and the authors' code begin with and are told to do, as figures: docs/parity.md."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model

from ccmim_fast.build.model import build_model
from ccmim_fast.config.load import load_config
from ccmim_fast.data.stream.crops import crop_boxes
from ccmim_fast.models.encoder import sincos_positions
from ccmim_fast.optim.update import lr_at, scaled_lr
from ccmim_kernels import sample_partition

METHOD = (Path(__file__).parents[1] / "docs" / "method.md").read_text()

# Deviations of initial weights: Xavier's sqrt(2 / (inputs + outputs)), uniform within sqrt(3) of them; those of the
# patches' bias are torch's, 1 / sqrt(3 inputs).
SPREADS = {
    "encoder.patch_embed.proj.weight": 0.03608,
    "encoder.patch_embed.proj.bias": 0.02083,
    "encoder.blocks.0.attn.qkv.weight": 0.02552,
    "encoder.blocks.0.attn.proj.weight": 0.03608,
    "encoder.blocks.0.mlp.fc1.weight": 0.02282,
    "encoder.blocks.0.mlp.fc2.weight": 0.02282,
    "decoder.embed.weight": 0.03953,
    "decoder.blocks.0.attn.qkv.weight": 0.03125,
    "decoder.blocks.0.attn.proj.weight": 0.04419,
    "decoder.blocks.0.mlp.fc1.weight": 0.02795,
    "decoder.blocks.0.mlp.fc2.weight": 0.02795,
    "decoder.pred.weight": 0.03953,
    "projector.0.weight": 0.03608,
    "projector.3.weight": 0.04419,
}
TOKENS = ("encoder.cls_token", "decoder.mask_token")  # normal, 0.02


def official(*more):
    return load_config(["--config=ccmim_vit_base_official", *more], "test")


def test_initial_weights():
    """ViT-B's and its decoder's, one block each; what is in neither list is 0, or 1 in a norm."""
    model = build_model(official("--model.depth=1", "--decoder.depth=1"))
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    for name, spread in SPREADS.items():
        weight = weights.pop(name)
        assert weight.std().item() == pytest.approx(spread, rel=2 / math.sqrt(weight.numel())), name
        assert weight.abs().max().item() == pytest.approx(spread * math.sqrt(3), rel=0.01), name
    for name in TOKENS:
        assert weights.pop(name).std().item() == pytest.approx(0.02, rel=0.1), name
    for name, weight in weights.items():
        norm = ".norm" in name or name.startswith("projector.1")
        assert (weight == (1.0 if norm and name.endswith("weight") else 0.0)).all(), name


def test_positions():
    """The column's sines and cosines, then the row's, at wavelengths of 2 pi 10000^(4i / D); zeros for [CLS]."""
    found = sincos_positions(16, (3, 5), 1)
    assert not found[0].any()
    for row, column in np.ndindex(3, 5):
        expected = [
            wave(place / 10000 ** (i / 4)) for place in (column, row) for wave in (math.sin, math.cos) for i in range(4)
        ]
        assert found[1 + row * 5 + column].tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("name", ["mae_vit_base", "ccmim_vit_base_official"])
def test_what_both_codes_are_told_to_do(name):
    """PRETRAIN.md of MAE, the README of the authors, and what both set no option for."""
    config = load_config([f"--config={name}"], "test")
    data, optim = config.data, config.optim
    assert (config.train.batch_size, config.train.epochs, optim.warmup_epochs) == (4096, 800, 40)
    assert (optim.base_lr, optim.min_lr, optim.weight_decay, optim.betas) == (1.5e-4, 0.0, 0.05, (0.9, 0.95))
    assert (optim.clip_grad, optim.decay_tokens, config.model.drop_path) == (0.0, True, 0.0)
    assert (data.image_size, data.crop_scale, data.flip) == ((224, 224), (0.2, 1.0), True)
    assert data.crop_ratio == pytest.approx((3 / 4, 4 / 3))
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (config.mask.ratio, config.target.kind, config.target.norm_pix) == (0.75, "pixels", True)
    assert (config.decoder.depth, config.decoder.dim, config.decoder.num_heads) == (8, 512, 16)


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 0.0), (0.5, 3e-5), (20, 1.2e-3), (40, 2.4e-3), (230, 2.0485e-3), (420, 1.2e-3), (800, 0.0)]
)
def test_rates_of_pretraining(epoch, rate):
    """At fractions of an epoch, before each optimizer step: a line of 40 epochs, half a cosine of 760."""
    config = load_config(["--config=mae_vit_base"], "test")
    peak, train = scaled_lr(config.optim.base_lr, config.train.batch_size), config.train
    found = lr_at(epoch, peak=peak, floor=config.optim.min_lr, warmup=config.optim.warmup_epochs, epochs=train.epochs)
    assert found == pytest.approx(rate, abs=1e-7)


@pytest.mark.parametrize(
    ("size", "mean", "deviation"),
    [((375, 500), 0.496, 0.185), ((500, 375), 0.495, 0.185), ((256, 256), 0.540, 0.201), ((300, 900), 0.305, 0.078)],
)
def test_share_of_the_image_that_a_crop_shows(size, mean, deviation):
    """RandomResizedCrop(224, scale=(0.2, 1)) of torchvision over 20,000 draws."""
    count = 20000
    sizes = np.tile(np.array([size], dtype=np.int32), (count, 1))
    boxes = crop_boxes(0, 0, np.arange(count), sizes, (0.2, 1.0), (3 / 4, 4 / 3))
    share = boxes[:, 2] * boxes[:, 3] / (size[0] * size[1])
    assert share.mean() == pytest.approx(mean, abs=0.003)
    assert share.std() == pytest.approx(deviation, abs=0.003)


def test_running_statistics_of_the_heads_are_torchs():
    model, _ = tiny_model(heads={"sync_bn": False})
    norms = [part for part in model.projector.modules() if isinstance(part, torch.nn.BatchNorm1d)]
    assert [(norm.eps, norm.momentum, norm.affine) for norm in norms] == [(1e-5, 0.1, True), (1e-5, 0.1, False)]


@pytest.mark.parametrize(("name", "noise"), [("Gumbel noise", "gumbel"), ("division by random numbers", "uniform")])
def test_shares_masked_by_both_readings_of_eq_5_are_those_of_the_page(name, noise):
    told = re.search(rf"^\| {name} \| (\S+) \| (\S+) \| (\S+) \|$", METHOD, re.M).groups()
    quantiles_L = torch.distributions.Normal(0, 0.5).icdf((torch.arange(196) + 0.5) / 196)
    share_L = quantiles_L.softmax(0)
    logits_L = share_L.log() if noise == "gumbel" else 12 * share_L  # the sums of 12 blocks are the logits of a softmax
    options = {"keep": 49, "grid": (14, 14), "seed": 0, "epoch": 0, "noise": noise}
    masked_L = sample_partition(logits_L.expand(10000, -1), torch.arange(10000), **options).mask_BL.float().mean(0)
    for figure, six in zip(told, (masked_L[-6:], masked_L[95:101], masked_L[:6])):
        assert six.mean().item() == pytest.approx(float(figure), abs=0.0055)


def test_the_page_tells_what_the_presets_hold():
    paper, code = load_config([], "test"), official()
    rows = dict(
        re.findall(r"^\| ([^|]+?) \| (.+?) \|$", METHOD.partition("## Where the authors' code differs")[2], re.M)
    )
    both = {name: row.split(" | ") for name, row in rows.items()}
    assert f"`{paper.score.source}`;" in METHOD.partition("The default, and that of `ccmim_vit_base`, is ")[2]
    for side, config in enumerate((paper, code)):
        rate = scaled_lr(config.optim.base_lr, config.train.batch_size)
        assert re.findall(r"\d+", both["decoder"][side]) == [str(config.decoder.depth)]
        assert f"{config.train.batch_size}" in both["batch, rate"][side]
        assert re.findall(r"\d\.?\d*e-\d", both["batch, rate"][side])[-1] == f"{rate:.1e}".replace("e-0", "e-").replace(
            ".0e", "e"
        )
        assert ("flip" in both["augmentation"][side]) == config.data.flip
        assert ("all ranks" in both["BatchNorm of the heads"][side]) == config.heads.sync_bn
        assert ("Xavier" in both["initial weights of the heads"][side]) == (config.heads.init == "xavier")
        assert ("none" not in both["decay of [CLS] and mask token"][side]) == config.optim.decay_tokens
    assert f"λ = {paper.contrast.weight}" in both["contrast"][0]
    assert f"τ = {code.contrast.temperature}, weight {code.contrast.weight} (0.2 in an earlier" in both["contrast"][1]
