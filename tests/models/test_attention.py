"""Every backend is the same attention; which one `auto` takes; what is refused."""

import sys

import pytest
import torch
from ops.gold import DTYPES

from ccmim_fast.errors import MachineError
from ccmim_fast.models import block as module
from ccmim_fast.models.block import BACKENDS, CUDA_ONLY, MEASURED_BEST, attention, check_attention

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
    ours = gradients(lambda q, k, v: attention(q, k, v, backend), inputs, out_gradient)
    for name, g, e, o in zip(("out", "q", "k", "v"), gold, eager, ours):
        assert o.dtype == dtype, name
        allowed = max(2 * (e - g).abs().max(), 4 * torch.finfo(dtype).eps * g.abs().max())
        assert (o - g).abs().max() <= allowed, name


def test_auto_takes_the_measured_one(monkeypatch):
    taken = []
    for name in ("_plain", "_memory_efficient"):
        monkeypatch.setattr(module, name, lambda *x, name=name: taken.append(name) or x[0])
    for tokens, dtype, expected in [
        (50, torch.bfloat16, ["_plain"]),
        (401, torch.bfloat16, ["_plain"]),
        (402, torch.bfloat16, []),
        (50, torch.float32, []),
    ]:
        taken.clear()
        q = torch.randn(1, tokens, 1, 8, dtype=dtype)
        attention(q, q, q, "auto")
        assert taken == expected, (tokens, dtype)


def test_auto_on_a_gpu_goes_by_its_table(monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "get_device_capability", lambda device: (9, 0))
    best = lambda tokens: module._measured_best(torch.device("cuda"), tokens, torch.bfloat16)  # noqa: E731
    assert best(50) == "sdpa"
    monkeypatch.setitem(MEASURED_BEST, ((9, 0), torch.bfloat16), ((50, "flash"), (197, "cudnn")))
    assert [best(n) for n in (49, 50, 51, 197, 198)] == ["flash", "flash", "cudnn", "cudnn", "sdpa"]


def test_half_precision_stays_under_autocast():
    q = torch.randn(2, 5, 1, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q, q, q, "plain").dtype == torch.bfloat16


def test_dropout_drops():
    q = torch.randn(2, 64, 2, 8)
    for backend in ("plain", "sdpa"):
        assert not torch.equal(attention(q, q, q, backend, dropout=0.5), attention(q, q, q, backend))


def test_missing_xformers_is_named(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"train\.attention=xformers: not installed; pip install xformers"):
        check_attention("xformers", torch.device("cuda"))
    check_attention("sdpa", torch.device("cpu"))
    assert "xformers" not in sys.modules
