"""Blocks that are compiled one by one share weights that are cast once a step, and train as eager ones do."""

import pytest
import torch
from few_steps import batches, config_for, here
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from ccmim_fast.engine.build import build_step
from ccmim_fast.engine.compile import compile_step, vit_blocks, warm_up
from ccmim_fast.models.precision import CastWeights, cast_once, with_cast_weights

CPU = torch.device("cpu")
SMALL = {"model": {"depth": 2}, "decoder": {"depth": 1}}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def test_no_block_casts_a_weight():
    """Nor, in the backward pass, the gradient of one: neither forward nor backward graphs have such a node."""
    shapes, converted = set(), []

    def watched(graph, inputs):
        casts = [n.meta["val"] for n in graph.graph.nodes if n.target is torch.ops.aten._to_copy.default]
        # Tokens have a symbolic size, which has no hash.
        fixed = [cast for cast in casts if all(isinstance(size, int) for size in cast.shape)]
        converted.extend(cast.dtype for cast in fixed if tuple(cast.shape) in shapes)
        return make_boxed_func(graph.forward)

    step = build_step(config_for(**SMALL, precision="bf16"), here(CPU))
    shapes |= {tuple(p.shape) for block in vit_blocks(step.model) for p in block.parameters() if p.ndim == 2}
    compile_step(step, "blocks", backend=aot_autograd(fw_compiler=watched, bw_compiler=watched))
    assert warm_up(step, 4, 1)
    assert not converted
    step.cast_blocks = []
    torch._dynamo.reset()
    assert warm_up(step, 4, 1)
    assert {torch.bfloat16, torch.float32} <= {*converted}, "nothing is cast at all: the test tests nothing"


@pytest.mark.parametrize("train", [{}, {"recompute": True}])
def test_weights_cast_once_train_as_those_cast_at_each_use(train):
    """Losses, norms of gradients and weights, bit for bit; of two micro-batches a step, with a pass for scores."""
    found = []
    for what in ("blocks", "off"):
        step = build_step(config_for(**SMALL, precision="bf16", **train), here(CPU))
        compile_step(step, what, backend="eager")
        results = [step(batches(2, CPU), lr=1e-3) for _ in range(3)]
        found.append([*(r.total for r in results), *(r.gradients.norms_P for r in results), *step.model.parameters()])
    assert all(map(torch.equal, *found))


def test_gradients_of_all_uses_reach_the_weights():
    """A use without gradients comes first, as for scores; a weight without any use gets none."""
    torch.manual_seed(0)
    layers, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False)), torch.randn(3, 4)
    with torch.no_grad(), (cast := CastWeights(layers, torch.bfloat16)), torch.autocast("cpu"):
        layers(x)
    with cast, torch.autocast("cpu"):
        (layers[0](x) + layers[0](2 * x)).sum().backward()
    found = layers[0].weight.grad
    layers.zero_grad()
    with torch.autocast("cpu"):
        (layers[0](x) + layers[0](2 * x)).sum().backward()
    assert found.dtype == torch.float32
    assert torch.equal(found, layers[0].weight.grad)
    assert layers[1].weight.grad is None


def test_a_module_has_its_own_weights_again():
    layer = nn.Linear(4, 4)
    own, names = layer.weight, [*layer.state_dict()]

    def fails(module):
        assert module.weight.dtype == torch.bfloat16
        raise RuntimeError

    with pytest.raises(RuntimeError), cast_once([layer], torch.bfloat16):
        with_cast_weights(fails)(layer)
    assert layer.weight is own
    assert [*layer.state_dict()] == names
    assert not hasattr(layer, "cast_weights")
    assert with_cast_weights(lambda module: module.weight)(layer) is own
