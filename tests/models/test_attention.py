"""Every backend is the same attention; which one runs; what is refused."""

import sys

import pytest
import torch
from ops.gold import DTYPES

from ccmim_fast.errors import MachineError
from ccmim_fast.models import block as module
from ccmim_fast.models.block import BACKENDS, CUDA_ONLY, attention, check_attention

# Backends that have no kernel for a dtype, on any device.
LACKING = {("flash", torch.float32), ("cudnn", torch.float32)}


def by_hand(q_BQNH, k_BTNH, v_BTNH):
    weights_BNQT = (torch.einsum("bqnh,btnh->bnqt", q_BQNH, k_BTNH) / q_BQNH.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bnqt,btnh->bqnh", weights_BNQT, v_BTNH)


def gradients(call, inputs, out_gradient):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    return [out, *torch.autograd.grad(out, leaves, out_gradient.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 50, 50, 3, 64), (3, 1, 148, 2, 64), (1, 147, 197, 2, 32), (2, 5, 7, 1, 24)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_float64(backend, shape, dtype, device):
    """Outputs and gradients within twice the error of plain PyTorch in the same dtype; queries may be few."""
    if backend in CUDA_ONLY and device.type != "cuda":
        pytest.skip("needs a CUDA device")
    if (backend, dtype) in LACKING:
        pytest.skip("no such kernel")
    if backend == "xformers":
        pytest.importorskip("xformers")
    B, Q, T, N, H = shape
    inputs = [torch.randn(B, n, N, H, device=device).to(dtype) for n in (Q, T, T)]
    out_gradient = torch.randn(B, Q, N, H, device=device).to(dtype)
    gold = gradients(by_hand, [x.double() for x in inputs], out_gradient.double())
    eager = gradients(by_hand, inputs, out_gradient)
    ours = gradients(lambda q, k, v: attention(q, k, v, backend=backend), inputs, out_gradient)
    for name, g, e, o in zip(("out", "q", "k", "v"), gold, eager, ours):
        assert o.dtype == dtype, name
        allowed = max(2 * (e - g).abs().max(), 4 * torch.finfo(dtype).eps * g.abs().max())
        assert (o - g).abs().max() <= allowed, name


def test_a_backend_for_each_shape(monkeypatch):
    taken = []
    for name in ("_plain", "memory_efficient"):
        monkeypatch.setattr(module, name, lambda *x, name=name: taken.append(name) or x[0])
    rows = (((50, 2, 8), "plain"), ((148, 2, 8), "xformers"))
    for tokens, heads, expected in [(50, 2, ["_plain"]), (148, 2, ["memory_efficient"]), (49, 2, []), (50, 1, [])]:
        taken.clear()
        q = torch.randn(1, 3, heads, 8)
        k = torch.randn(1, tokens, heads, 8)
        attention(q, k, k, backend=rows)
        assert taken == expected, (tokens, heads)
        taken.clear()
        attention(q, k, k)
        assert not taken


def test_half_precision_stays_under_autocast():
    q = torch.randn(2, 5, 1, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q, q, q, backend="plain").dtype == torch.bfloat16


def test_dropout_drops():
    q = torch.randn(2, 64, 2, 8)
    for backend in ("plain", "sdpa"):
        assert not torch.equal(attention(q, q, q, backend=backend, dropout=0.5), attention(q, q, q, backend=backend))


def test_missing_xformers_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "xformers", raising=False)  # another test may have it
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"train\.attention=xformers: not installed; pip install xformers"):
        check_attention("xformers", torch.device("cuda"))
    check_attention("sdpa", torch.device("cpu"))
    assert "xformers" not in sys.modules
