"""MAE's published recipe of fine-tuning, held by figures: what `finetune` hands to the loop by its preset."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from ccmim_fast.config.evaluation import images_of
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation import finetune
from ccmim_fast.evaluation.encoders import read_encoder
from ccmim_fast.evaluation.images import Images, open_both
from ccmim_fast.evaluation.job import Job
from ccmim_fast.evaluation.protocols import protocol
from ccmim_fast.ranks.session import open_session

# Shares of the rate, by layers from the embedding to the last block: 0.65 ** 13 ... 0.65, as MAE's lr_decay gives.
RATES = (0.003697, 0.005688, 0.008751, 0.013463, 0.020712, 0.031864, 0.049022, 0.075419, 0.116029, 0.178506, 0.274625)
RATES += (0.4225, 0.65)


@pytest.fixture
def prepared(cache, tmp_path, monkeypatch):
    """`prepared(mixup=0, ...)` -> (vit, inputs, optimizer, loader) of the preset, with other settings of `augment`."""
    monkeypatch.setattr(finetune, "Classifier", lambda job, *parts: SimpleNamespace(run=parts))
    weights = read_encoder("timm:vit_tiny_patch16_224")

    def prepare(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3), **augment):
        config = protocol("finetune").config
        data = replace(config.data, source="shapes", root=str(cache), image_size=(32, 32), samples=60, test_samples=20)
        config = replace(
            config,
            data=replace(data, workers=1),
            augment=replace(config.augment, **augment),
            train=replace(config.train, batch_size=20, device="cpu"),
        )
        if len(mean) != 3:
            for part, label, number in product(("train", "val"), "ab", range(12)):
                (folder := tmp_path / str(len(mean)) / part / label).mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{number}.npy", np.full((40, 48, len(mean)), number, dtype=np.uint8))
            data = replace(config.data, source="images", root=str(tmp_path / str(len(mean))))
            config = replace(config, data=data)
        both = [images_of(config.data, mean, std, test) for test in (False, True)]
        with open_session("cpu", 1.0) as here:
            images = map(Images, open_both(config, *both), both)
            return finetune.prepare(Job(config, here, tmp_path, weights._replace(mean=mean, std=std), *images))

    return prepare


def test_augmentation_is_maes(prepared):
    *_, loader = prepared()
    crop, flip, policy, _, normalise, erase = loader._transform.transforms
    assert isinstance(crop, RandomResizedCropAndInterpolation)
    assert (crop.size, crop.scale, crop.ratio, crop.interpolation.value) == (
        (32, 32),
        (0.08, 1.0),
        (3 / 4, 4 / 3),
        "bicubic",
    )
    assert isinstance(flip, transforms.RandomHorizontalFlip)
    assert flip.p == 0.5
    assert isinstance(policy, RandAugment)
    assert policy.num_layers == 2
    assert {(op.magnitude, op.magnitude_std, op.prob) for op in policy.ops} == {(9, 0.5, 0.5)}
    assert {"PosterizeIncreasing", "SolarizeIncreasing", "ColorIncreasing"} <= {op.name for op in policy.ops}
    torch.testing.assert_close(torch.as_tensor(normalise.mean), torch.tensor((0.4, 0.5, 0.6)))
    assert isinstance(erase, RandomErasing)
    assert (erase.probability, erase.mode, erase.min_count, erase.max_count) == (0.25, "pixel", 1, 1)


def test_images_of_other_channels_are_cropped_flipped_erased_and_mixed(prepared):
    """The crops of tensors are Pillow's to a level: here of the channels of a gray image, stacked five times."""
    gray, tensors = np.random.default_rng(0).integers(0, 256, (40, 48, 1), dtype=np.uint8), []
    for channels in (1, 3, 5):
        mean, std = channels * (0.5,), channels * (0.25,)
        *_, loader = prepared(mean, std, auto="", erase=0.0)
        image_CHW, _ = loader.make(gray.repeat(channels, 2), 7, 0)
        assert (image_CHW.shape, image_CHW.dtype) == ((channels, 32, 32), torch.float32)
        tensors.append(image_CHW[-1] * 0.25 * 255)
    for of_tensor in (tensors[0], tensors[2]):
        assert (of_tensor - tensors[1]).abs().mean() < 0.5, (
            "levels of 255, of noise, which overshoots between two passes"
        )
    vit, inputs, _, loader = prepared(5 * (0.5,), 5 * (0.25,), auto="", erase=1.0)
    images_BCHW, shares_BC = next(loader.stream(0))
    assert vit(inputs(images_BCHW)).shape == shares_BC.shape == (20, 2)
    with pytest.raises(ConfigError, match=r"augment\.auto=rand-.* of 3 channels, not 1; set augment.auto=''"):
        prepared((0.5,), (0.25,))


def test_targets_are_smoothed_and_mixed(prepared):
    """Of 6 classes: 0.9 + 0.1 / 6 and 0.1 / 6. A batch is mixed with itself backwards, in one share."""
    *_, loader = prepared(mixup=0.0, cutmix=0.0)
    _, plain_BC = next(loader.stream(0))
    found = sorted({round(value, 4) for value in plain_BC.flatten().tolist()})
    assert found == [0.0167, 0.9167]
    *_, loader = prepared()
    mixed_BC = next(loader.stream(0))[1].double()
    shares_BC = (mixed_BC - 0.1 / 6) / 0.9
    one_hot_BC = (plain_BC > 0.5).double()
    differ = (one_hot_BC != one_hot_BC.flip(0)).any(1)
    [share] = {round(value, 4) for value in (shares_BC * one_hot_BC).sum(1)[differ].tolist()}
    torch.testing.assert_close(shares_BC, share * one_hot_BC + (1 - share) * one_hot_BC.flip(0), rtol=0, atol=1e-4)


def test_rates_decay_and_initial_weights_are_maes(prepared):
    vit, _, optimizer, _ = prepared()
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    layers = [("cls_token", "pos_embed", "patch_embed"), *((f"blocks.{block}.",) for block in range(12))]
    for name, parameter in vit.named_parameters():
        layer = [number for number, names in enumerate(layers) if name.startswith(names)]
        rate = RATES[layer[0]] if layer else 1.0
        spared = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
        assert found[id(parameter)] == (pytest.approx(rate, rel=1e-3), 0.0 if spared else 0.05), name
    assert {name for name, _ in vit.named_parameters() if name.startswith(("fc_norm", "norm"))} == {
        "fc_norm.weight",
        "fc_norm.bias",
    }
    assert vit.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    assert not vit.head.bias.any()
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in vit.blocks]
    assert rates == pytest.approx([0.1 * block / 11 for block in range(12)])
    assert optimizer.defaults["betas"] == (0.9, 0.999)
