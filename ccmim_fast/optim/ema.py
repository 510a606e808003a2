"""Averaged weights (EMA)."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ccmim_fast.optim.update import own_part


def build_ema(model: nn.Module, decay: float) -> AveragedModel | None:
    """Return a copy of `model` to average into, or None where `decay` is 0."""
    return AveragedModel(model) if decay else None


@torch.no_grad()
def update_ema_(ema: AveragedModel, model: nn.Module, decay: float) -> None:
    """Set averaged = decay * averaged + (1 - decay) * weights in one multi-tensor pass; copy the buffers.

    `AveragedModel.update_parameters` reads its count from the device at every step, and so waits for it.
    """
    averaged, weights = ([own_part(p) for p in one.parameters()] for one in (ema.module, model))
    torch._foreach_lerp_(averaged, weights, 1 - decay)
    for average, buffer in zip(ema.module.buffers(), model.buffers()):
        average.copy_(buffer)
    ema.n_averaged += 1


@contextlib.contextmanager
def averaged_in(model: nn.Module, ema: AveragedModel) -> Iterator[None]:
    """Exchange the weights of `model` and their averages in the body, in the same memory, bit for bit."""
    pairs = [(own_part(a), own_part(b)) for a, b in zip(ema.module.parameters(), model.parameters())]

    def exchange() -> None:
        for a, b in pairs:
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)

    exchange()
    try:
        yield
    finally:
        exchange()
