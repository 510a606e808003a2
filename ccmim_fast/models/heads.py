"""Projector and predictor of the contrastive half, with BatchNorm statistics over all ranks."""

# B local batch, D encoder width, E embedding dim

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class GlobalBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d whose training statistics are those of the global batch; every rank must hold equally many rows.

    torch's SyncBatchNorm runs on GPUs only; this one runs on any backend. Input [B, E] float, statistics float32.

    Args:
        sync: False: statistics of the rank's own rows, as in BatchNorm1d.
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
    """Mean over ranks; its gradient is summed over ranks, as the statistics enter every rank's loss."""
    if torch.is_grad_enabled() and x.requires_grad:
        return all_reduce(x) / world
    x = x.clone()
    dist.all_reduce(x)
    return x / world


def build_projector(width: int, dim: int, *, sync_bn: bool) -> nn.Sequential:
    """Linear - BN - ReLU - Linear - BN without affine: [B, width] -> [B, dim] (authors' code)."""
    return nn.Sequential(
        nn.Linear(width, width, bias=False),
        GlobalBatchNorm(width, sync=sync_bn),
        nn.ReLU(),
        nn.Linear(width, dim, bias=False),
        GlobalBatchNorm(dim, affine=False, sync=sync_bn),
    )


def build_predictor(dim: int, *, sync_bn: bool) -> nn.Sequential:
    """The two-layer MLP p of Eq. 8 (SimSiam): [B, dim] -> [B, dim]."""
    return nn.Sequential(
        nn.Linear(dim, dim, bias=False),
        GlobalBatchNorm(dim, sync=sync_bn),
        nn.ReLU(),
        nn.Linear(dim, dim),
    )
