"""A prediction put back into the image: a perfect one gives the image again."""

import pytest
import torch

from ccmim_fast.losses.criteria import Pixels
from ccmim_fast.report.snapshots import paste_prediction
from ccmim_kernels import masked_target, sample_partition

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_perfect_prediction_gives_the_image(norm_pix):
    images = torch.randint(0, 256, (3, 8, 12, 3), dtype=torch.uint8)
    part = sample_partition(None, torch.arange(3), keep=2, grid=(2, 3), seed=0, epoch=0, strategy="random")
    target = masked_target(images, part.ids_masked_BM, 4, torch.tensor(MEAN), torch.tensor(STD), norm_pix)
    pasted = paste_prediction(Pixels(4, MEAN, STD, norm_pix=norm_pix), images, target, part)
    assert torch.equal(pasted, images)


def test_only_masked_patches_change_and_values_are_clamped():
    images = torch.randint(1, 255, (1, 8, 12, 3), dtype=torch.uint8)
    part = sample_partition(None, torch.arange(1), keep=2, grid=(2, 3), seed=0, epoch=0, strategy="random")
    wild = torch.full((1, 4, 48), 1e4)
    pasted = paste_prediction(Pixels(4, MEAN, STD, norm_pix=False), images, wild, part)
    masked = part.mask_BL[0].reshape(2, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(pasted[0][~masked], images[0][~masked])
    assert (pasted[0][masked] == 255).all()
