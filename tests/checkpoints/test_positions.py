"""Positions of another grid: by the two bicubic filters, against loops and timm."""

import copy
import math

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from ccmim_fast.checkpoints.positions import resampled
from ccmim_fast.checkpoints.published import Weights
from ccmim_fast.evaluation.encoders import IMAGENET, build_encoder


def cubic(x, a=-0.75):
    """Keys' kernel; a is what OpenCV and torch without antialiasing take."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def line(values, count):
    """Return `count` values between those of a line; each is a sum over four neighbours, those at the ends repeated."""
    found = []
    for i in range(count):
        at = (i + 0.5) * len(values) / count - 0.5
        first = math.floor(at) - 1
        near = [min(max(k, 0), len(values) - 1) for k in range(first, first + 4)]
        found.append(sum(cubic(at - first - k) * values[n] for k, n in enumerate(near)))
    return found


@pytest.mark.parametrize("new", [(3, 7), (2, 2), (6, 10), (4, 5)])
def test_plain_positions_are_sums_over_four_neighbours(new):
    old, positions = (4, 5), torch.randn(1, 2 + 20, 3)
    found = resampled(positions, old, new, antialias=False)
    assert torch.equal(found[:, :2], positions[:, :2])  # of [CLS] and a register
    for channel in range(3):
        grid = positions[0, 2:, channel].double().view(old).tolist()
        columns = list(zip(*(line(row, new[1]) for row in grid)))
        expected = torch.tensor([line(column, new[0]) for column in columns]).T
        torch.testing.assert_close(found[0, 2:, channel].double().view(new), expected.double(), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("antialias", "kernel"),
    [(False, (-0.0352, -0.1055, 0.2617, 0.8789)), (True, (-0.0234, -0.0703, 0.2266, 0.8672))],
)
def test_kernels_at_twice_the_grid(antialias, kernel):
    """One position that differs, as it is spread: a is -0.75, but -0.5 of torch's antialiased filter, as Pillow's."""
    positions = torch.zeros(1, 7, 1)
    positions[0, 3] = 1
    found = resampled(positions, (1, 7), (1, 14), antialias)[0, :, 0]
    expected = torch.tensor([0, 0, 0, *kernel, *kernel[::-1], 0, 0, 0])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_antialiased_positions_are_timms_and_others():
    positions = torch.randn(1, 1 + 20, 3)
    for new in ((3, 7), (6, 10)):
        found = resampled(positions, (4, 5), new)
        torch.testing.assert_close(found, resample_abs_pos_embed(positions, new_size=new, old_size=(4, 5)))
        assert (found - resampled(positions, (4, 5), new, antialias=False)).abs().max() > 0.05


@pytest.mark.parametrize("resample", ["antialias", "plain"])
@pytest.mark.parametrize(
    "arch",
    ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_wee_patch16_reg1_gap_256", "eva02_tiny_patch14_224"],
)
def test_an_encoder_of_any_size_is_that_of_each_size(resample, arch):
    """Its positions are resampled for each batch as those of an encoder built for that size; with registers too."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    vit = timm.create_model(arch, num_classes=0, **sizes)
    torch.nn.init.normal_(vit.pos_embed)
    weights = Weights("w", vit.state_dict(), arch, 3, *IMAGENET, image_size=(32, 32))
    any_size = build_encoder(weights, (32, 32), resample=resample, any_size=True).eval()
    for size in ((32, 32), (48, 40), (16, 64)):
        pixels = torch.randn(2, 3, *size)
        expected = build_encoder(weights, size, resample=resample).eval().forward_features(pixels)
        torch.testing.assert_close(copy.deepcopy(any_size).forward_features(pixels), expected)
    copied = copy.deepcopy(any_size)  # as averaged weights are
    torch.nn.init.zeros_(copied.pos_embed)
    assert not torch.equal(copied.forward_features(pixels), any_size.forward_features(pixels))
