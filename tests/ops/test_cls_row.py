"""`cls_row` equals loops over heads and tokens."""

import math

import pytest
import torch
from ops.gold import DTYPES, compare

from ccmim_kernels import cls_row
from ccmim_kernels.cls_row import _cls_row


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


# (B, T, prefix, N, H): ViT-B, odd, the smallest, 1,024 patches, a wide head.
SHAPES = [(2, 197, 1, 12, 64), (3, 16, 5, 3, 7), (1, 2, 1, 1, 1), (1, 1025, 1, 2, 64), (1, 9, 1, 1, 300)]


@pytest.mark.fault(
    "softmax over the padding too", 'row = tl.where((token < T)[None, :], row, float("-inf"))', "row = row"
)
@pytest.mark.fault("heads past the last counted", "mean += tl.where(used, row, 0.0)", "mean += row")
@pytest.mark.fault("sum over heads, not mean", "total + tl.sum(mean, 0) / N", "total + tl.sum(mean, 0)")
@pytest.mark.fault("logits read without a barrier", "is read below.\n    tl.debug_barrier()\n", "is read below.\n")
@pytest.mark.fault("the first keys for all tokens", "k = following\n", "following = k\n")
@pytest.mark.fault("the queries of the first heads for all", "place * q_stride_n", "(place - first) * q_stride_n")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["logits", "softmax"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, kind, dtype, device):
    B, T, prefix, N, H = shape
    inputs = {
        "q_BNH": torch.randn(B, N, H, device=device, dtype=dtype),
        "k_BTNH": torch.randn(B, T, N, H, device=device, dtype=dtype),
        "total_BL": torch.rand(B, T - prefix, device=device),
    }
    compare(cls_row, inputs, [], str(shape), prefix=prefix, kind=kind, scale=H**-0.5)


def test_rows_add_up(device):
    q, k = torch.randn(2, 3, 8, device=device), torch.randn(2, 7, 3, 8, device=device)
    for kernels in ("triton", "reference"):
        one = cls_row(q, k, prefix=1, kind="softmax", scale=1.0, kernels=kernels)
        before = one.clone()
        two = cls_row(q, k, prefix=1, kind="softmax", scale=1.0, total_BL=one, kernels=kernels)
        assert torch.equal(two, one + one)
        assert torch.equal(one, before)


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_one_token_dominates(logit, device):
    """Softmax of +-1e4 neither overflows nor gives NaN: all attention, or none, goes to patch 4."""
    q, k = torch.ones(1, 2, 4, device=device), torch.zeros(1, 7, 2, 4, device=device)
    k[:, 5] = logit / 4
    row = cls_row(q, k, prefix=1, kind="softmax", scale=1.0, kernels="triton")
    expected = torch.zeros(6) if logit > 0 else torch.full((6,), 1 / 6)
    expected[4] = 1.0 if logit > 0 else 0.0
    torch.testing.assert_close(row[0].cpu(), expected)


def test_kernel_takes_strided_keys(device):
    """Keys are as they come out of a qkv projection, [B, T, 3, N, H], and queries those of token 0."""
    qkv = torch.randn(2, 9, 3, 4, 8, device=device)
    q, k = qkv[:, 0, 0], qkv[:, :, 1]
    ours = cls_row(q, k, prefix=1, kind="softmax", scale=0.3, kernels="triton")
    assert torch.equal(
        ours, cls_row(q.contiguous(), k.contiguous(), prefix=1, kind="softmax", scale=0.3, kernels="triton")
    )
    torch.testing.assert_close(ours, cls_row(q, k, prefix=1, kind="softmax", scale=0.3))
    # A last dimension that is not contiguous is copied.
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(cls_row(q, turned, prefix=1, kind="softmax", scale=0.3, kernels="triton"), ours)


def test_too_many_tokens_is_refused_by_name(device):
    q, k = torch.zeros(1, 1, 1, device=device), torch.zeros(1, 2049, 1, 1, device=device)
    with pytest.raises(
        ValueError, match="head_dim=1025 must be at most 1024 for kernels=triton; use kernels=reference"
    ):
        cls_row(
            torch.zeros(1, 1, 1025), torch.zeros(1, 2, 1, 1025), prefix=1, kind="logits", scale=1.0, kernels="triton"
        )
    with pytest.raises(ValueError, match="tokens=2049 must be at most 2048 for kernels=triton; use kernels=reference"):
        cls_row(q, k, prefix=1, kind="logits", scale=1.0, kernels="triton")


def test_opcheck(device):
    q, k = torch.randn(2, 3, 8, device=device), torch.randn(2, 7, 3, 8, device=device)
    torch.library.opcheck(_cls_row, (q, k, None, 1, "softmax", 0.3))
    torch.library.opcheck(_cls_row, (q, k, torch.rand(2, 6, device=device), 1, "logits", 0.3))
