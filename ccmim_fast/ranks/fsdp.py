"""FSDP2: weights, gradients and moments divided among ranks, a block's weights gathered when it first runs.

Each block of encoder and decoder is a unit, the rest of the model another. What is gathered stays until the backward
pass is done with it: a step runs the encoder up to three times (scores, visible, masked) and back, and a copy in half
precision is 2 bytes of the 16 that a weight has in float32 with gradient and moments, 1.3 GB for ViT-H.

torch divides the first axis and fills it up to a multiple of the ranks: positions [1, 197, 768] would be gathered as
512 times their size by 512 ranks. So an axis is chosen that the ranks divide, and what is not trained stays whole.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from ccmim_fast.errors import MachineError
from ccmim_fast.models.block import ViTBlock
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.ranks.session import Session


def shard(model: CCMIM, here: Session, dtype: torch.dtype | None) -> None:
    """Divide the weights of `model`, equal on all ranks, in place; every rank calls it.

    A parameter that is not trained, such as fixed positions, stays whole on each rank and is sent by none. Blocks are
    gathered in `dtype`, that of the step's products, half the bytes of float32. Weights, their gradients' sums over
    ranks and the optimizer's moments are float32 all the same. The first block, which Eq. 4 is read at, and what stands
    outside blocks are gathered in float32: scores and statistics are. Raises MachineError, see `check_mean`.
    """
    check_mean(here)
    mesh = init_device_mesh(here.device.type, (here.world_size,))
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    divide = partial(
        fully_shard,
        mesh=mesh,
        reshard_after_forward=False,
        shard_placement_fn=lambda parameter: Shard(divided_axis(parameter.shape, here.world_size)),
        ignored_params={parameter for parameter in model.parameters() if not parameter.requires_grad},
    )
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        policy = exact if block is model.encoder.blocks[0] else half
        divide(block, mp_policy=policy)
        for method in ("cls_attention", "folded_direction") if isinstance(block, ViTBlock) else ():
            register_fsdp_forward_method(block, method)
    divide(model, mp_policy=exact)
    # A look (`engine.look`) begins with it, and passes the tokens through parts of the model.
    register_fsdp_forward_method(model, "embed")
    # Before the first block of the last pass torch sees the last block of the pass before, which is done with by then,
    # and would gather it once more. The whole model is not divided yet.
    model.encoder.blocks[0].set_modules_to_backward_prefetch([model])


def check_mean(here: Session) -> None:
    """Return if ranks that gloo connects average what they scatter; else raise MachineError. Every rank calls it.

    gloo of torch 2.7 adds where FSDP2 asks it to average (findings/torch_gloo_average_sums.sh): gradients would be too
    large by the number of ranks, which AdamW does not show, but clipping does.
    """
    if dist.get_backend() != "gloo":
        return
    mean = torch.zeros(1)
    dist.reduce_scatter_tensor(mean, torch.ones(here.world_size), op=dist.ReduceOp.AVG)
    if mean.item() != 1:
        raise MachineError(
            f"train.parallel=fsdp: gloo of torch {torch.__version__} adds the gradients of ranks and does "
            "not average them; use ddp, or a newer torch"
        )


def divided_axis(shape: Sequence[int], ranks: int) -> int:
    """Return the first axis that `ranks` divide evenly, else 0: torch fills up no other."""
    return next((axis for axis, size in enumerate(shape) if size % ranks == 0), 0)


def let_go(model: nn.Module) -> None:
    """Drop what a forward pass without a backward pass has gathered: weights may be changed after it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)
