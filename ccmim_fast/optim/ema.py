"""Averaged weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ccmim_fast.optim.gradients import own_part


def build_ema(model: nn.Module, decay: float) -> AveragedModel | None:
    """A copy of `model` to average into, or None where `decay` is 0."""
    return AveragedModel(model) if decay else None


@torch.no_grad()
def update_ema_(ema: AveragedModel, model: nn.Module, decay: float) -> None:
    """averaged = decay * averaged + (1 - decay) * weights, one multi-tensor pass; buffers are copied.

    `AveragedModel.update_parameters` reads its count from the device at every step, which waits for it.
    """
    averaged, weights = ([own_part(p) for p in one.parameters()] for one in (ema.module, model))
    torch._foreach_lerp_(averaged, weights, 1 - decay)
    for kept, buffer in zip(ema.module.buffers(), model.buffers()):
        kept.copy_(buffer)
    ema.n_averaged += 1


@contextlib.contextmanager
def averaged_in(model: nn.Module, ema: AveragedModel) -> Iterator[None]:
    """Within, `model` has the averaged weights, in the same memory; then its own again, bit for bit."""
    pairs = [(own_part(a), own_part(b)) for a, b in zip(ema.module.parameters(), model.parameters())]
    _exchange_(pairs)
    try:
        yield
    finally:
        _exchange_(pairs)


@torch.no_grad()
def _exchange_(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for a, b in pairs:
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
