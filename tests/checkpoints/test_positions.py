"""Positions of another grid: by the two bicubic filters, against loops and timm."""

import copy
import math

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from ccmim_fast.checkpoints.positions import resampled
from ccmim_fast.checkpoints.published import Weights, read_weights
from ccmim_fast.cli import main
from ccmim_fast.errors import CheckpointError, ConfigError
from ccmim_fast.evaluation.encoders import IMAGENET, build_encoder, read_encoder
from ccmim_fast.models.encoder import sincos_positions


def small_vit(**options):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}).eval()


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


def test_a_grid_that_nobody_tells_is_asked_for(tmp_path, capsys):
    for name, size in (("oblong", (32, 48)), ("square", (32, 72))):  # 4 x 6; 4 x 9 are as many as 6 x 6
        torch.save(small_vit(img_size=size).state_dict(), tmp_path / f"{name}.pth")
        weights = read_encoder(str(tmp_path / f"{name}.pth"), "vit_tiny_patch16_224", 2)
        for wanted in (size, size[::-1], (64, 96)):
            with pytest.raises(
                ConfigError, match=r"has positions of \d\d patches.* add --model\.pretrained_size=\[H,W\]"
            ):
                build_encoder(weights, wanted, 2)
        told = read_encoder(str(tmp_path / f"{name}.pth"), "vit_tiny_patch16_224", 2, pretrained_size=size)
        assert torch.equal(build_encoder(told, size, 2).pos_embed, weights.tensors["pos_embed"])
        wrong = read_encoder(str(tmp_path / f"{name}.pth"), "vit_tiny_patch16_224", 2, pretrained_size=(48, 40))
        with pytest.raises(CheckpointError, match=r"images of 48 x 40 pixels give 6 x 5"):
            build_encoder(wrong, size, 2)
    command = ["import", str(tmp_path / "oblong.pth"), "--arch=vit_tiny_patch16_224", "--model.num_heads=2"]
    assert main([*command, f"--out={tmp_path / 'a'}"]) == 2
    error = capsys.readouterr().err
    assert "positions of 24 patches, and does not tell the size of its images; 224 x 224, 32 x 32 pixels" in error
    assert main([*command, f"--out={tmp_path / 'a'}", "--data.image_size=[32,48]"]) == 0


def test_going_on_at_another_size_resamples(tmp_path):
    vit = small_vit()
    torch.save(vit.state_dict(), tmp_path / "w.pth")
    command = ["import", str(tmp_path / "w.pth"), "--arch=vit_tiny_patch16_224", "--model.num_heads=2"]
    assert main([*command, f"--out={tmp_path / 'run'}", "--data.image_size=[64,48]"]) == 0
    expected = resample_abs_pos_embed(vit.pos_embed, new_size=(8, 6), old_size=(4, 4))
    torch.testing.assert_close(read_weights(str(tmp_path / "run")).tensors["encoder.pos_embed"], expected)
    assert main([*command, f"--out={tmp_path / 'maes'}", "--data.image_size=[64,48]", "--resample=plain"]) == 0
    expected = resampled(vit.pos_embed, (4, 4), (8, 6), antialias=False)
    assert torch.equal(read_weights(str(tmp_path / "maes")).tensors["encoder.pos_embed"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fixed_positions_are_computed_at_another_size(tmp_path, dtype):
    """As MAE's: what is resampled would be no sine and cosine any more."""
    vit = small_vit()
    vit.pos_embed.data = sincos_positions(vit.embed_dim, (4, 4), 1)[None]
    torch.save({name: value.to(dtype) for name, value in vit.state_dict().items()}, tmp_path / "w.pth")
    command = ["import", str(tmp_path / "w.pth"), "--arch=vit_tiny_patch16_224", "--model.num_heads=2"]
    assert main([*command, f"--out={tmp_path / 'run'}", "--data.image_size=[64,48]"]) == 0
    found = read_weights(str(tmp_path / "run")).tensors["encoder.pos_embed"]
    assert torch.equal(found[0], sincos_positions(vit.embed_dim, (8, 6), 1))
