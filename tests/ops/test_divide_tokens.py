"""`divide_tokens` is score, sample and gather in one: it must equal the three done apart."""

import pytest
import torch

from ccmim_kernels import divide_tokens, gather_tokens, sample_partition

GRID = (4, 5)
WHERE = {"grid": GRID, "keep": 6, "seed": 2, "epoch": 1}


def made(dtype=torch.float64):
    tokens = torch.randn(3, 20, 8, dtype=dtype, requires_grad=True)
    prefix = torch.randn(2, 8, dtype=dtype, requires_grad=True)
    return tokens, prefix, torch.tensor([5, 0, 9])


def test_direction_equals_layer_norm_written_as_loops():
    tokens, prefix, ids = made()
    direction = torch.randn(8, dtype=torch.float64)
    out = divide_tokens(tokens, prefix, ids, direction_D=direction, eps=1e-6, **WHERE)
    for b in range(3):
        for i in range(20):
            x = tokens[b, i].tolist()
            mean = sum(x) / 8
            var = sum((v - mean) ** 2 for v in x) / 8
            expected = sum((v - mean) / (var + 1e-6) ** 0.5 * d for v, d in zip(x, direction.tolist()))
            assert out.logits[b, i].item() == pytest.approx(expected, rel=1e-12)
    alone = sample_partition(out.logits, ids, **WHERE)
    assert torch.equal(out.partition.mask_BL, alone.mask_BL)


@pytest.mark.parametrize("strategy", ["random", "block", "importance", "importance_sampling"])
def test_equals_its_parts(strategy):
    tokens, prefix, ids = made()
    logits = torch.randn(3, 20) if strategy.startswith("importance") else None
    out = divide_tokens(tokens, prefix, ids, logits_BL=logits, strategy=strategy, **WHERE)
    part = sample_partition(logits, ids, strategy=strategy, **WHERE)
    assert all(torch.equal(a, b) for a, b in zip(out.partition, part))
    assert torch.equal(out.visible, gather_tokens(tokens, part.ids_visible_BK, prefix))
    assert torch.equal(out.masked, gather_tokens(tokens, part.ids_masked_BM, prefix))


def test_gradient_comes_from_the_visible_set_alone():
    tokens, prefix, ids = made()
    out = divide_tokens(tokens, prefix, ids, logits_BL=torch.randn(3, 20), **WHERE)
    assert not out.masked.requires_grad
    out.visible.sum().backward()
    for b in range(3):
        touched = tokens.grad[b].abs().sum(1).nonzero()[:, 0].tolist()
        assert touched == out.partition.ids_visible_BK[b].tolist()
    assert torch.equal(prefix.grad, torch.full_like(prefix, 3.0))


def test_without_the_masked_set():
    tokens, prefix, ids = made()
    assert divide_tokens(tokens, prefix, ids, strategy="random", with_masked=False, **WHERE).masked is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (4, 4)}, r"grid=\(4, 4\) has 16 patches, tokens have 20"),
        ({"logits_BL": torch.zeros(3, 20), "direction_D": torch.zeros(8)}, "needs either logits or direction, got 2"),
        ({}, "needs either logits or direction, got 0"),
        ({"keep": 20}, r"keep=20 must be in 1\.\.19"),
    ],
)
def test_errors(options, message):
    tokens, prefix, ids = made()
    with pytest.raises(ValueError, match=message):
        divide_tokens(tokens, prefix, ids, **{**WHERE, **options})
