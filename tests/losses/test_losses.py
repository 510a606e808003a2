"""Eq. 8 against loops, Eq. 10 as a sum, and float32 losses whatever the forward pass ran in."""

import math

import pytest
import torch
from tiny import images, tiny_model, total_loss

from ccmim_fast.losses.criteria import Align, Hog, InfoNCE
from ccmim_kernels import hog_target, info_nce


def test_align_against_loops():
    masked, visible = torch.randn(2, 5, 7, dtype=torch.float64).unbind()
    total = 0.0
    for m, v in zip(masked.tolist(), visible.tolist()):
        dot = sum(a * b for a, b in zip(m, v))
        total += 1 - dot / math.sqrt(sum(a * a for a in m)) / math.sqrt(sum(b * b for b in v))
    assert Align()(visible, masked).item() == pytest.approx(total / 5, rel=1e-12)
    assert Align()(visible.half(), masked.half()).dtype == torch.float32


def test_hog_stays_in_float64():
    hog, pictures, ids = Hog(8, (0.5,) * 3, (0.5,) * 3, hog_cell=8), images(2), torch.arange(3).expand(2, 3)
    pred = torch.randn(2, 3, hog.width, dtype=torch.float64)
    target = hog_target(pictures, ids, patch=8, cell=8, dtype=torch.float64)
    assert hog(pred, pictures, ids).item() == pytest.approx((pred - target).square().mean().item(), rel=1e-14)


def test_align_teaches_the_student_alone():
    masked, visible = torch.randn(2, 5, 7).unbind()
    masked, visible = masked.clone().requires_grad_(), visible.clone().requires_grad_()
    Align()(visible, masked).backward()
    assert masked.grad is None
    assert visible.grad is not None


def test_one_process_contrasts_with_itself():
    masked, visible = torch.randn(2, 5, 7).unbind()
    expected = info_nce(masked, visible, tau=0.2)
    assert torch.equal(InfoNCE(temperature=0.2)(visible, masked), expected)


@pytest.mark.parametrize("weight", [0.0, 0.2, 1.5])
def test_total_is_the_weighted_sum(weight):
    model, config = tiny_model(contrast={"weight": weight})
    pictures = images()
    losses = total_loss(model, model(pictures, torch.arange(4), 0), pictures, config)
    assert losses.total.item() == pytest.approx(losses.recons.item() + weight * losses.contrast.item())


def test_mae_is_reconstruction_alone():
    model, config = tiny_model(contrast={"loss": "none"})
    pictures = images()
    losses = total_loss(model, model(pictures, torch.arange(4), 0), pictures, config)
    assert losses.contrast is None
    assert losses.total is losses.recons


def test_losses_are_float32_under_autocast():
    model, config = tiny_model(dtype=torch.float32)
    pictures = images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pictures, torch.arange(4), 0)
    assert output.pred_BMP.dtype == torch.bfloat16
    assert {loss.dtype for loss in total_loss(model, output, pictures, config)} == {torch.float32}
