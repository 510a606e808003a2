"""Projector and predictor of the contrastive half, and the exchange of their rows among ranks.

BatchNorm statistics are those of all ranks. The rows of all ranks travel while something else is computed; what forward
starts, backward waits for, and the other way round:

    forward     `start_all_gather`: starts             masked branch, decoder     `finish_all_gather`: waits for rows
    backward    `finish_all_gather`: reduce-scatter    decoder                    `start_all_gather`: waits for their
                starts                                                            gradient

Autograd runs what was done last first, so in the backward pass, too, the decoder stands between the two. The rows go in
one piece: pieces could hide the loss over those rows alone, 0.05 ms of a ViT-B step on 1,024 ranks, and each would have
the latency again, 2.2 ms (docs/scaling.md).
"""

# B local batch, N global batch, D encoder width, E embedding dim

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class GlobalBatchNorm(nn.BatchNorm1d):
    """This BatchNorm1d has the training statistics of the global batch; every rank must hold equally many rows.

    torch's SyncBatchNorm runs on GPUs only; this one runs on any backend. Input [B, E] float, statistics float32;
    without `sync` they are those of the rank's own rows, as in BatchNorm1d.
    """

    def __init__(self, dim: int, *, affine: bool = True, sync: bool = True):
        super().__init__(dim, affine=affine)
        self.sync = sync

    def forward(self, x_BE: Tensor) -> Tensor:
        # Under autocast the rows come in half precision; statistics keep the module's own (float32).
        x_BE = x_BE.to(self.running_mean.dtype)
        world = dist.get_world_size() if self.sync and dist.is_initialized() else 1
        if not self.training or world == 1:
            return super().forward(x_BE)
        mean_E = _mean_over_ranks(x_BE.mean(0), world)
        # Centred before squaring: E[x^2] - E[x]^2 cancels in float32.
        var_E = _mean_over_ranks((x_BE - mean_E).square().mean(0), world)
        with torch.no_grad():
            rows = len(x_BE) * world
            self.running_mean.lerp_(mean_E, self.momentum)
            self.running_var.lerp_(var_E * (rows / (rows - 1)), self.momentum)
            self.num_batches_tracked += 1
        normed_BE = (x_BE - mean_E) * (var_E + self.eps).rsqrt()
        return normed_BE if self.weight is None else normed_BE * self.weight + self.bias


def _mean_over_ranks(x: Tensor, world: int) -> Tensor:
    """Return the mean over ranks; its gradient is summed over ranks, as the statistics enter every rank's loss."""
    if torch.is_grad_enabled() and x.requires_grad:
        return all_reduce(x) / world
    x = x.clone()
    dist.all_reduce(x)
    return x / world


class Heads(NamedTuple):
    """The modules of the contrastive half, and whose rows travel among ranks (see `registry.Contrast`)."""

    projector: nn.Module
    predictor: nn.Module | None = None
    negatives: str = ""


def build_projector(width: int, dim: int, *, sync_bn: bool) -> nn.Sequential:
    """Build Linear - BN - ReLU - Linear - BN without affine: [B, width] -> [B, dim] (authors' code)."""
    return nn.Sequential(
        nn.Linear(width, width, bias=False),
        GlobalBatchNorm(width, sync=sync_bn),
        nn.ReLU(),
        nn.Linear(width, dim, bias=False),
        GlobalBatchNorm(dim, affine=False, sync=sync_bn),
    )


def build_predictor(dim: int, *, sync_bn: bool) -> nn.Sequential:
    """Build the two-layer MLP p of Eq. 8 (SimSiam): [B, dim] -> [B, dim]."""
    return nn.Sequential(
        nn.Linear(dim, dim, bias=False),
        GlobalBatchNorm(dim, sync=sync_bn),
        nn.ReLU(),
        nn.Linear(dim, dim),
    )


class _Flight:
    """This is a collective on its way: the rows of all ranks, later the gradient of the own ones."""

    work: dist.Work
    gathered_NE: Tensor | None


# The own rows, and the collective that takes them to all ranks; or rows as of all ranks, and None.
AsyncAllGather = tuple[Tensor, _Flight | None]


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own_BE: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.gathered_NE = own_BE.new_empty(len(own_BE) * dist.get_world_size(), *own_BE.shape[1:])
        flight.work = dist.all_gather_into_tensor(flight.gathered_NE, own_BE.contiguous(), async_op=True)
        return own_BE.view_as(own_BE)

    @staticmethod
    def backward(ctx, grad_BE: Tensor) -> tuple[Tensor, None]:
        ctx.flight.work.wait()
        return grad_BE, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own_BE: Tensor, flight: _Flight) -> Tensor:
        ctx.flight, rows_NE = flight, flight.gathered_NE
        flight.work.wait()
        flight.gathered_NE = None
        return rows_NE

    @staticmethod
    def backward(ctx, grad_NE: Tensor) -> tuple[Tensor, None]:
        # Each rank's loss has a gradient for all rows: their sum goes to the rank that sent the row.
        grad_BE = grad_NE.new_empty(len(grad_NE) // dist.get_world_size(), *grad_NE.shape[1:])
        ctx.flight.work = dist.reduce_scatter_tensor(grad_BE, grad_NE.contiguous(), async_op=True)
        return grad_BE, None


def start_all_gather(own_BE: Tensor, alone: bool = False) -> AsyncAllGather | None:
    """Begin to give these rows to all ranks; every rank must call it, with equally many. None: there is one rank.

    `alone` sends nothing, and takes copies of the own rows for those of other ranks, which need as much memory.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return (own_BE.repeat(dist.get_world_size(), 1), None) if alone else _start(own_BE)


def finish_all_gather(started: AsyncAllGather | None) -> Tensor | None:
    """Return the rows of all ranks [N, E], in rank order; a row's gradient is summed over ranks, where it came from."""
    if started is None:
        return None
    return started[0] if started[1] is None else _finish(started)


# A compiled step is cut here: within one graph, the compiler's schedule would say when a collective begins and ends.
@torch.compiler.disable
def _start(own_BE: Tensor) -> AsyncAllGather:
    flight = _Flight()
    return _Start.apply(own_BE, flight), flight


@torch.compiler.disable
def _finish(started: AsyncAllGather) -> Tensor:
    return _Finish.apply(*started)
