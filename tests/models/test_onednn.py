"""oneDNN's linear layers: the function and the gradients of torch's, and only where they were chosen."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from naive import without
from tiny import images, tiny_config

from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.engine.build import build_step
from ccmim_fast.engine.compile import compile_step
from ccmim_fast.models import precision
from ccmim_fast.models.precision import linear_layers, product
from ccmim_fast.profile.meter import flop_counter
from ccmim_fast.ranks.session import Session

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


class Everywhere(dict):
    """Every layer by oneDNN."""

    def get(self, key, default):
        return "onednn"


def by_onednn(output: torch.Tensor) -> bool:
    return output.grad_fn is not None and "Addmm" not in output.grad_fn.name() and "_Linear" in output.grad_fn.name()


@pytest.mark.parametrize("shape", [(3, 5, 7), (9, 33), (1, 4), (2, 3, 4, 5), (2, 50, 192)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs", ["all", "weight", "input"])
def test_equals_float64(shape, bias, needs):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=needs != "weight")
    weight = torch.randn(65, shape[-1], requires_grad=needs != "input")
    bias_D = torch.randn(65, requires_grad=needs == "all") if bias else None
    with linear_layers(Everywhere()):
        found = F.linear(x, weight, bias_D)
    assert by_onednn(found)
    leaves = [leaf for leaf in (x, weight, bias_D) if leaf is not None]
    doubles = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    expected = F.linear(*doubles)
    grad = torch.randn(found.shape)
    found.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(found, expected.float())
    for leaf, double in zip(leaves, doubles, strict=True):
        assert (leaf.grad is None) == (double.grad is None)
        if double.grad is not None:
            torch.testing.assert_close(leaf.grad, double.grad.float(), rtol=1e-5, atol=1e-4)


def test_any_strides():
    x = torch.randn(6, 4, 8).transpose(0, 1)
    weight = torch.randn(8, 12, requires_grad=True).t()[3:9]
    with linear_layers(Everywhere()):
        found = F.linear(x, weight)
    torch.testing.assert_close(found, x.double().matmul(weight.double().t()).float())


def test_what_is_left_to_torch():
    """Other layers, other dtypes, autocast, and everything outside the context."""
    x, weight = torch.randn(4, 8), torch.randn(3, 8, requires_grad=True)
    assert not by_onednn(F.linear(x, weight))
    with linear_layers(None):
        assert not by_onednn(F.linear(x, weight))
    with linear_layers(Everywhere()):
        assert by_onednn(F.linear(x, weight))
        assert not by_onednn(F.linear(x.double(), weight.double()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert F.linear(x, weight).dtype == torch.bfloat16
    with linear_layers({(8, 3): "onednn"}):
        assert by_onednn(F.linear(x, weight))
        assert not by_onednn(F.linear(weight, x))


def test_no_rows():
    weight = torch.randn(3, 8, requires_grad=True)
    with linear_layers(Everywhere()):
        F.linear(torch.randn(0, 8), weight).sum().backward()
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("section", "fields", "ours"),
    [
        ("train", {}, True),
        ("train", {"recompute": True}, False),
        ("train", {"compile": "blocks"}, False),
    ],
)
def test_the_step_takes_them_where_it_can(monkeypatch, section, fields, ours):
    """Same losses and norm of the gradient, and their arithmetic is counted."""
    config = tiny_config(optim={"clip_grad": 1.0}, train={"batch_size": 4, "precision": "fp32"})
    here = Session(0, 1, torch.device("cpu"))
    plain = without(build_step(config, here), ["onednn_linear"])
    changed = dataclasses.replace(getattr(config, section), **fields)
    step = build_step(dataclasses.replace(config, **{section: changed}), here)
    step.linear = step.linear if step.linear is None else Everywhere()
    compile_step(step, fields.get("compile", "off"), backend="eager")
    batch = Batch(images(4), torch.arange(4), torch.zeros(4, dtype=torch.int64))
    taken = []
    monkeypatch.setattr(precision, "product", lambda *tensors: taken.append(1) or product(*tensors))
    with torch.compiler.set_stance("force_eager"):
        expected, expected_flops = counted(plain, batch)
        assert not taken
        found, flops = counted(step, batch)
    assert bool(taken) == ours
    if not step.config.train.recompute:
        assert flops == expected_flops
    torch.testing.assert_close(torch.stack(found[:4]), torch.stack(expected[:4]))


def counted(step, batch):
    with flop_counter() as counter:
        result = step([batch], 1e-3)
    return result, counter.get_total_flops()
