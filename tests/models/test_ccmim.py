"""The whole model: what receives gradients, what is saved, and that every short cut gives the same numbers."""

import pytest
import torch
from tiny import images, tiny_config, tiny_model, total_loss

from ccmim_fast.build.model import build_model, build_objective
from ccmim_fast.errors import ConfigError
from ccmim_fast.models.tokens import encode
from ccmim_fast.registry import CONTRASTS, SCORE_SOURCES, TARGETS
from ccmim_kernels import info_nce, sample_partition

IDS = torch.arange(4)


def gradients(model, config, pictures, **options):
    model.zero_grad()
    output = model(pictures, IDS, 0, **options)
    total_loss(model, output, pictures, config).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("source", [name for name, source in SCORE_SOURCES.items() if not source.has_bank])
@pytest.mark.parametrize("contrast", CONTRASTS)
def test_every_combination_trains_every_weight(source, contrast):
    model, config = tiny_model(score={"source": source, "block": 1}, contrast={"loss": contrast})
    grads = gradients(model, config, images())
    assert set(grads) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("strategy", ["random", "block", "importance", "importance_sampling"])
@pytest.mark.parametrize("noise", ["gumbel", "uniform"])
def test_every_strategy_hides_the_given_share(strategy, noise):
    model, _ = tiny_model(mask={"strategy": strategy, "noise": noise})
    output = model(images(), IDS, 0)
    assert output.partition.mask_BL.sum(1).tolist() == [18] * 4
    assert output.pred_BMP.shape == (4, 18, 192)


@pytest.mark.parametrize("contrast", ["nce", "none"])
def test_a_prediction_alone_is_that_of_the_whole_pass(contrast):
    model, _ = tiny_model(contrast={"loss": contrast})
    pictures = images()
    output = model(pictures, IDS, 0)
    assert torch.equal(model.predict(pictures, output.partition), output.pred_BMP)
    other = model(pictures, IDS, 1).partition
    assert not torch.equal(model.predict(pictures, other), output.pred_BMP)


def test_teacher_receives_no_gradient():
    """The gradient equals that of a loss whose teacher is a constant."""
    model, config = tiny_model()
    pictures = images()
    output = model(pictures, IDS, 0)
    assert not output.masked_BE.requires_grad
    whole = gradients(model, config, pictures, partition=output.partition)
    model.zero_grad()
    constant = output.masked_BE.detach().clone()
    output = model(pictures, IDS, 0, partition=output.partition)
    losses = total_loss(model, output, pictures, config)
    tau = config.contrast.temperature
    (losses.recons + 0.2 * info_nce(constant, output.visible_BE, tau=tau)).backward()
    for name, grad in whole.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)


def test_masked_branch_saves_no_activation():
    """24 patches, 18 masked: nothing with 19 rows ([CLS] and the masked patches) is kept for the backward pass."""
    model, _ = tiny_model(score={"source": "first"})
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        output = model(images(), IDS, 0)
    assert any(7 in shape for shape in shapes), "the visible branch is kept"
    assert not any(19 in shape or 4 * 19 in shape for shape in shapes)
    # And the check can see it: with gradients the same branch keeps such tensors.
    shapes.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        encode(model.encoder, torch.randn(4, 19, 48, dtype=torch.float64, requires_grad=True))
    assert any(19 in shape for shape in shapes)
    assert output.masked_BE is not None


def test_given_partition_is_taken():
    model, _ = tiny_model()
    part = sample_partition(None, IDS, keep=6, grid=(4, 6), seed=9, epoch=9, strategy="random")
    output = model(images(), IDS, 0, partition=part)
    assert output.partition is part
    assert output.logits_BL is None


def test_mask_follows_the_sample_not_the_batch():
    """Scores included: the same image with the same id gets the same mask alone and in a batch."""
    model, _ = tiny_model()
    model.eval()
    pictures = images(6)
    ids = torch.tensor([11, 5, 7, 900, 2, 1])
    whole = model(pictures, ids, 4).partition.mask_BL
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(model(pictures[order], ids[order], 4).partition.mask_BL, whole[order])
    halves = [model(pictures[i : i + 3], ids[i : i + 3], 4).partition.mask_BL for i in (0, 3)]
    assert torch.equal(torch.cat(halves), whole)


def test_constant_image_gives_a_finite_loss_and_a_seeded_mask():
    """Fault 24: zero-variance patches and attention ties."""
    model, config = tiny_model()
    flat = torch.full((4, 32, 48, 3), 90, dtype=torch.uint8)
    output = model(flat, IDS, 0)
    losses = total_loss(model, output, flat, config)
    assert losses.total.isfinite()
    losses.total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert torch.equal(model(flat, IDS, 0).partition.mask_BL, output.partition.mask_BL)
    assert len(output.partition.mask_BL.unique(dim=0)) == 4


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("norm_pix", [True, False])
def test_targets(kind, norm_pix):
    model, config = tiny_model(target={"kind": kind, "norm_pix": norm_pix})
    pictures = images()
    output = model(pictures, IDS, 0)
    known = {"pixels": 8 * 8 * 3, "hog": 9 * 3}
    assert output.pred_BMP.shape[-1] == known.get(kind, build_objective(config, model).reconstruction.width)
    assert total_loss(model, output, pictures, config).total.isfinite()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mask": {"ratio": 0.99}}, r"mask.ratio=0.99 leaves 0 of 24 patches visible; nearest valid: 0.9583"),
        ({"target": {"kind": "hog", "hog_cell": 3}}, "target.hog_cell=3 must divide the patch size 8; nearest: 2"),
        ({"score": {"source": "block", "block": 7}}, r"score.block=7 must be in 0\.\.2"),
    ],
)
def test_config_errors(sections, message):
    with pytest.raises(ConfigError, match=message):
        build_model(tiny_config(**sections))
