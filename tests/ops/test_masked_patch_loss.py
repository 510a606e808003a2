"""Eq. 9 with and without norm_pix against loops over images, patches and pixels."""

import math

import pytest
import torch

from ccmim_kernels import masked_patch_loss, masked_target, patchify, unpatchify

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def stats(channels):
    return (
        torch.tensor((MEAN * 3)[:channels], dtype=torch.float64),
        torch.tensor((STD * 3)[:channels], dtype=torch.float64),
    )


def target_by_loops(image, patch_index, patch, norm_pix):
    """Values of one patch in (row, column, channel) order; `image` is a nested list [H][W][C]."""
    columns, channels = len(image[0]) // patch, len(image[0][0])
    top, left = patch_index // columns * patch, patch_index % columns * patch
    values = [
        (image[top + y][left + x][c] / 255 - (MEAN * 3)[c]) / (STD * 3)[c]
        for y in range(patch)
        for x in range(patch)
        for c in range(channels)
    ]
    if norm_pix:
        mean = sum(values) / len(values)
        var = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        values = [(v - mean) / math.sqrt(var + 1e-6) for v in values]
    return values


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(("size", "patch", "channels"), [((6, 10), 2, 3), ((8, 4), 4, 1), ((5, 5), 5, 4)])
def test_against_loops(norm_pix, size, patch, channels):
    images = torch.randint(0, 256, (2, *size, channels), dtype=torch.uint8)
    patches = size[0] // patch * (size[1] // patch)
    ids = torch.stack([torch.randperm(patches)[: max(1, patches // 2)].sort().values for _ in range(2)])
    pred = torch.randn(2, ids.shape[1], patch * patch * channels, dtype=torch.float64, requires_grad=True)
    mean, std = stats(channels)
    loss = masked_patch_loss(pred, images, ids, patch=patch, mean_C=mean, std_C=std, norm_pix=norm_pix)
    total, count = 0.0, 0
    for b in range(2):
        for m, index in enumerate(ids[b].tolist()):
            target = target_by_loops(images[b].tolist(), index, patch, norm_pix)
            total += sum((p - t) ** 2 for p, t in zip(pred[b, m].tolist(), target))
            count += len(target)
    assert loss.item() == pytest.approx(total / count, rel=1e-12)
    loss.backward()
    mine = masked_target(images, ids, patch, mean, std, norm_pix)
    torch.testing.assert_close(pred.grad, 2 * (pred.detach() - mine) / count)


def test_constant_image_is_finite():
    images = torch.full((1, 4, 4, 3), 128, dtype=torch.uint8)
    mean, std = stats(3)
    pred = torch.zeros(1, 4, 12, dtype=torch.float64)
    loss = masked_patch_loss(pred, images, torch.arange(4)[None], patch=2, mean_C=mean, std_C=std)
    assert loss.isfinite()


def test_half_precision_prediction_gives_a_float32_loss():
    images = torch.randint(0, 256, (1, 4, 4, 3), dtype=torch.uint8)
    mean, std = (s.float() for s in stats(3))
    loss = masked_patch_loss(
        torch.zeros(1, 4, 12).bfloat16(), images, torch.arange(4)[None], patch=2, mean_C=mean, std_C=std
    )
    assert loss.dtype == torch.float32


def test_patchify_order_and_inverse():
    images = torch.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    # Patch 4 of image 1 covers rows 2-3 and columns 2-3; value 7 is row 1, column 0, channel 1.
    assert patches[1, 4, 7] == images[1, 3, 2, 1]
    assert torch.equal(unpatchify(patches, 2, 4, 6), images)


def test_errors():
    images = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    mean, std = stats(3)
    with pytest.raises(ValueError, match=r"prediction is \[1, 3, 12\], expected \[1, 4, 12\]"):
        masked_patch_loss(torch.zeros(1, 3, 12), images, torch.arange(4)[None], patch=2, mean_C=mean, std_C=std)
    with pytest.raises(ValueError, match=r"expected torch\.uint8"):
        masked_patch_loss(torch.zeros(1, 4, 12), images.float(), torch.arange(4)[None], patch=2, mean_C=mean, std_C=std)
    with pytest.raises(ValueError, match="image 4x4 is no multiple of patch=3"):
        patchify(images, 3)
