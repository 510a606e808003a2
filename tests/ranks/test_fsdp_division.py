"""What each of many ranks sends with divided weights, in one process: a group of ranks that are not there."""

import pytest
import torch
import torch.distributed as dist
from divided import filled
from few_steps import batches, config_for
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from ccmim_fast.build.model import build_model
from ccmim_fast.engine.build import build_step
from ccmim_fast.errors import MachineError
from ccmim_fast.ranks.fsdp import check_mean, divided_axis
from ccmim_fast.ranks.session import Session

# `align` sends no rows.
CONFIG = config_for(contrast={"loss": "align"}, parallel="fsdp", device="cpu", batch_size=4)


@pytest.fixture(params=[8, 512])
def here(request):
    """The first of so many ranks; what the others would send is left unwritten."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield Session(0, request.param, torch.device("cpu"))
    dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """Elements that this rank gives to each kind of collective, call by call."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            given = args[1] if func._opname.endswith("base_") else args[0][0]
            self.calls.setdefault(func._opname, []).append(given.numel())
        return func(*args, **(kwargs or {}))


def test_a_step_sends_each_weight_once(here):
    """And its gradient, each as often as the formula of benchmarks/divided.py says."""
    step = build_step(CONFIG, here)
    step(batches(1, here.device), 1e-3)
    with Sent() as sent:
        step(batches(1, here.device), 1e-3)
    of_unit = [[*block.parameters()] for block in (*step.model.encoder.blocks, *step.model.decoder.blocks)]
    in_blocks = {parameter for unit in of_unit for parameter in unit}
    trained = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    of_unit.append([parameter for parameter in trained if parameter not in in_blocks])
    sizes = sorted(filled([p.shape for p in unit], here.world_size) for unit in of_unit)
    assert sorted(size * here.world_size for size in sent.calls["_allgather_base_"]) == sizes
    assert sorted(sent.calls["_reduce_scatter_base_"]) == sizes


def test_what_is_not_trained_is_whole(here):
    model = build_step(CONFIG, here).model
    whole = {name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)}
    assert whole == {"encoder.pos_embed", "decoder.pos_embed"}
    assert model.state_dict().keys() == build_model(CONFIG).state_dict().keys()
    assert model.encoder.pos_embed.shape == build_model(CONFIG).encoder.pos_embed.shape


@pytest.mark.parametrize(
    ("shape", "ranks", "axis"),
    [
        ((1, 1, 768), 256, 2),
        ((1, 1, 768), 512, 0),
        ((768, 3, 16, 16), 8, 0),
        ((256, 768), 256, 0),
        ((768, 512), 512, 1),
        ((588,), 8, 0),
    ],
)
def test_the_axis_that_is_divided(shape, ranks, axis):
    assert divided_axis(shape, ranks) == axis


@pytest.mark.parametrize("mean", [1.0, 2.0])
def test_ranks_that_add_gradients_are_refused(monkeypatch, mean):
    """Of two ranks: torch 2.7's gloo returns the sum for the average that it is asked for."""
    asked = []
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "reduce_scatter_tensor", lambda out, *_, op: (asked.append(op), out.fill_(mean)))
    here = Session(0, 2, torch.device("cpu"))
    if mean == 1:
        check_mean(here)
    else:
        with pytest.raises(MachineError, match=r"^train\.parallel=fsdp: gloo of torch .* use ddp, or a newer torch"):
            check_mean(here)
    assert asked == [dist.ReduceOp.AVG]
