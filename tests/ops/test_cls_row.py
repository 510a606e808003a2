"""`cls_row` against loops over heads and tokens."""

import math

import pytest
import torch

from ccmim_kernels import cls_row


def row_by_loops(q, k, prefix, kind, scale):
    heads, tokens = len(q), len(k)
    row = [0.0] * (tokens - prefix)
    for n in range(heads):
        logits = [scale * sum(a * b for a, b in zip(q[n], k[t][n])) for t in range(tokens)]
        if kind == "softmax":
            total = sum(math.exp(v) for v in logits)
            logits = [math.exp(v) / total for v in logits]
        for i in range(tokens - prefix):
            row[i] += logits[prefix + i] / heads
    return row


@pytest.mark.parametrize("kind", ["logits", "softmax"])
@pytest.mark.parametrize(("heads", "prefix"), [(1, 1), (3, 1), (4, 5)])
def test_against_loops(kind, heads, prefix):
    q, k = torch.randn(2, heads, 6, dtype=torch.float64), torch.randn(2, 11, heads, 6, dtype=torch.float64)
    out = cls_row(q, k, prefix=prefix, kind=kind, scale=0.3)
    for b in range(2):
        assert out[b].tolist() == pytest.approx(
            row_by_loops(q[b].tolist(), k[b].tolist(), prefix, kind, 0.3), rel=1e-12
        )


def test_half_precision_input_gives_float32_even_under_autocast():
    q, k = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 7, 3, 8).bfloat16()
    plain = cls_row(q, k, prefix=1, kind="logits", scale=1.0)
    assert plain.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cls_row(q, k, prefix=1, kind="logits", scale=1.0), plain)


def test_errors():
    q, k = torch.zeros(2, 3, 8), torch.zeros(2, 7, 3, 8)
    with pytest.raises(ValueError, match="kind='mean' must be one of logits, softmax"):
        cls_row(q, k, prefix=1, kind="mean", scale=1.0)
    with pytest.raises(ValueError, match=r"prefix=7 must be in 1\.\.6"):
        cls_row(q, k, prefix=7, kind="logits", scale=1.0)
    with pytest.raises(ValueError, match=r"queries are \[2, 4, 8\], keys want \[2, 3, 8\]"):
        cls_row(torch.zeros(2, 4, 8), k, prefix=1, kind="logits", scale=1.0)
