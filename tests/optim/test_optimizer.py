"""Optimizers, clipping within the update, averaged weights."""

import sys
import types

import pytest
import torch
from tiny import tiny_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ccmim_fast.errors import MachineError
from ccmim_fast.optim.ema import build_ema, update_ema_
from ccmim_fast.optim.optimizer import build_optimizer
from ccmim_fast.optim.update import guard, set_lr, update

SETTINGS = {"lr": 1e-2, "weight_decay": 0.05, "betas": (0.9, 0.95)}


def scaler(device, enabled=False):
    return torch.amp.GradScaler(device.type, enabled=enabled)


def parameters(device, seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(n, 3, device=device)) for n in (4, 1, 7)]


@pytest.mark.parametrize("capturable", [False, pytest.param(True, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e6])
def test_clipping_within_the_update_is_clipping_before_it(limit, capturable, device):
    ours, theirs = parameters(device), parameters(device)
    lr = torch.tensor(1e-2, device=device) if capturable else 1e-2
    fused = torch.optim.AdamW(ours, lr=lr, fused=True, capturable=capturable)
    plain = torch.optim.AdamW(theirs, lr=1e-2)
    for step in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a) * 10**step
            b.grad = a.grad.clone()
        norm = guard(fused, scaler(device), [ours[:1], ours[1:]], limit).norm
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, limit))
        fused.step()
        plain.step()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_of_other_optimizers_are_clipped_in_place(device):
    weights = parameters(device)
    for weight in weights:
        weight.grad = torch.full_like(weight, 5.0)
    before = torch.nn.utils.get_total_norm([w.grad for w in weights])
    torch.testing.assert_close(guard(torch.optim.SGD(weights), scaler(device), [weights], 1.0).norm, before)
    after = torch.nn.utils.get_total_norm([w.grad for w in weights])
    torch.testing.assert_close(after, torch.ones_like(after))


def test_norms_are_those_of_each_part(device):
    weights = parameters(device)
    for weight in weights[:2]:
        weight.grad = torch.randn_like(weight)
    found = guard(torch.optim.AdamW(weights, fused=True), scaler(device), [weights[:1], weights[1:]])
    expected = torch.stack([weights[0].grad.norm(), weights[1].grad.norm()])
    torch.testing.assert_close(found.norms_P, expected)
    torch.testing.assert_close(found.norm, expected.square().sum().sqrt())
    assert not found.bad


@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["fused", "plain"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_update_with_gradients_that_are_not_finite(value, kind, limit, device):
    """Weights, moments and step counts stay; the next update is the one that would have come in its place."""
    ours, theirs = parameters(device), parameters(device)
    make = {"fused": lambda w: torch.optim.AdamW(w, fused=True), "plain": torch.optim.AdamW}[kind]
    mine, other = make(ours), make(theirs)
    for bad in (False, True, True, False):
        torch.manual_seed(3)
        for a, b in zip(ours, theirs):
            a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
            b.grad.copy_(a.grad)
        if bad:
            ours[1].grad[0, 1] = value
        before = [w.detach().clone() for w in ours]
        found = guard(mine, scaler(device), [ours], limit)
        update(mine, scaler(device), found.bad)
        assert bool(found.bad) == bad
        assert all(torch.equal(a, b) for a, b in zip(ours, before)) == bad
        if not bad:
            update(other, scaler(device), guard(other, scaler(device), [theirs], limit).bad)
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b)
        assert float(mine.state[a]["step"]) == float(other.state[b]["step"]) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_scaler_tries_too_large_scales_and_nobody_minds(limit):
    """Steps without an update are told of once the scale is down to 1."""
    device = torch.device("cuda")
    weights, scale = parameters(device), torch.amp.GradScaler("cuda", init_scale=4.0)
    fused, told = torch.optim.AdamW(weights, fused=True), []
    for _ in range(4):
        scale.scale(sum((w * w).sum() for w in weights)).backward()
        weights[0].grad[0, 0] = float("nan")
        found = guard(fused, scale, [weights], limit)
        update(fused, scale, found.bad)
        fused.zero_grad()
        told.append(bool(found.bad))
    assert told == [False, False, True, True]


@pytest.mark.gpu
def test_clipping_under_a_scaler():
    device = torch.device("cuda")
    ours, theirs = parameters(device), parameters(device)
    fused, plain, scale = torch.optim.AdamW(ours, fused=True), torch.optim.AdamW(theirs), scaler(device, True)
    scale.scale(sum((w * w).sum() for w in ours)).backward()
    sum((w * w).sum() for w in theirs).backward()
    norm = guard(fused, scale, [ours], 1.0).norm
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0))
    scale.step(fused)
    plain.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


def test_averages_are_torchs_but_for_the_first_step():
    """torch's begins at the weights after the first step, ours at those before it."""
    model, _ = tiny_model(torch.float32)
    ours, theirs = build_ema(model, 0.9), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.n_averaged += 1
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
            for buffer in model.buffers():
                buffer += 1
        update_ema_(ours, model, 0.9)
        theirs.update_parameters(model)
    assert int(ours.n_averaged) == 3
    for a, b in zip(ours.module.state_dict().values(), theirs.module.state_dict().values()):
        torch.testing.assert_close(a, b)
    assert build_ema(model, 0.0) is None


def test_rate_is_set_in_place_where_it_is_a_tensor():
    weight = torch.nn.Parameter(torch.ones(2))
    for lr in (0.1, torch.tensor(0.1)):
        optimizer = torch.optim.AdamW([weight], lr=lr, fused=True)
        before = optimizer.param_groups[0]["lr"]
        set_lr(optimizer, 0.5)
        assert float(optimizer.param_groups[0]["lr"]) == 0.5
        if isinstance(lr, torch.Tensor):
            assert optimizer.param_groups[0]["lr"] is before


def made_apex(monkeypatch, error=None):
    """A module like apex's, whose optimizers remember how they were made."""

    class Remembered(torch.optim.AdamW):
        def __init__(self, groups, lr, **given):
            if error is not None:
                raise RuntimeError(error)
            super().__init__(groups, lr=lr)
            self.given = given

    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedAdam, optimizers.FusedLAMB = (type(name, (Remembered,), {}) for name in ("FusedAdam", "FusedLAMB"))
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def test_apex_is_given_our_groups_and_settings(monkeypatch):
    made_apex(monkeypatch)
    model, _ = tiny_model(torch.float32)
    adam = build_optimizer("apex_adamw", model, capturable=True, **SETTINGS)
    assert type(adam).__name__ == "FusedAdam"
    assert adam.given == {"betas": (0.9, 0.95), "adam_w_mode": True, "capturable": True}
    lamb = build_optimizer("apex_lamb", model, **SETTINGS)
    assert type(lamb).__name__ == "FusedLAMB"
    assert lamb.given == {"betas": (0.9, 0.95), "max_grad_norm": float("inf")}
    assert [group["weight_decay"] for group in lamb.param_groups] == [0.0, 0.05]
    with pytest.raises(MachineError, match=r"apex_lamb: does not work with train\.cuda_graph"):
        build_optimizer("apex_lamb", model, capturable=True, **SETTINGS)


def test_missing_apex_is_told_with_how_to_build_it(monkeypatch):
    model, _ = tiny_model(torch.float32)
    # Another package of that name, as the package index has one.
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)
    with pytest.raises(MachineError, match=r"optim.name=apex_adamw: NVIDIA apex is not installed; build .* --no-build"):
        build_optimizer("apex_adamw", model, **SETTINGS)
    made_apex(monkeypatch, error="apex.optimizers.FusedAdam requires cuda extensions")
    with pytest.raises(MachineError, match="apex lacks its CUDA extensions"):
        build_optimizer("apex_adamw", model, **SETTINGS)
