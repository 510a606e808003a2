"""The probe's figures on masks and objects that are known."""

import pytest
import torch
from tiny import images, tiny_model, total_loss

from ccmim_fast.ablation.demo import probe
from ccmim_fast.evaluation.masks.objects import object_leakage, object_patches


def test_figures_are_those_of_the_models_own_masks():
    model, config = tiny_model(dtype=torch.float32)
    model.eval()
    pictures = images(8)
    objects = torch.zeros(8, 32, 48, dtype=torch.bool)
    objects[:, 8:24, 16:40] = True
    figures, output, scores = probe(model, config, pictures, objects)
    again = model(pictures, torch.arange(8), 0)
    assert torch.equal(again.partition.mask_BL, output.partition.mask_BL)
    assert figures["leakage"] == object_leakage(again.partition.mask_BL, object_patches(objects, 8))
    assert figures["recons"] == pytest.approx(total_loss(model, again, pictures, config).recons.item())
    assert 0 <= figures["auroc"] <= 1
    torch.testing.assert_close(scores.sum(1), torch.ones(8))


def test_random_masks_leak_as_random_masks_do():
    model, config = tiny_model(dtype=torch.float32, mask={"strategy": "random"}, contrast={"loss": "none"})
    objects = torch.zeros(400, 32, 48, dtype=torch.bool)
    objects[:, :16, :24] = True
    figures, _, _ = probe(model.eval(), config, images(400), objects)
    # 6 of 24 patches are object in each of 400 images: the standard error of the visible share is below 0.01.
    assert figures["leakage"] == pytest.approx(1.0, abs=0.12)
