"""Rows of all ranks, which travel while something else is computed.

What forward starts, backward waits for, and the other way round:

    forward     `send`: all-gather starts      masked branch, decoder     `arrived`: waits for the rows
    backward    `arrived`: reduce-scatter      decoder                    `send`: waits for their gradient
                starts

Autograd runs what was done last first, so in the backward pass, too, the decoder stands between the two. The rows go in
one piece: of 1,024 ranks with 128 images each they are 134 MB, on paper 0.6 ms of bandwidth and 2.2 of latency, behind
8 ms of masked branch and decoder (ViT-B; docs/scaling.md). All that pieces could hide is the loss over those rows, 0.05
ms, and each of them would have the latency again.
"""

# B local batch, N global batch, E embedding dim

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class _Flight:
    """What is on its way: the rows of all ranks, later the gradient of the own ones."""

    work: dist.Work
    rows_NE: Tensor | None


class Sent(NamedTuple):
    """Own rows on their way to all ranks."""

    own_BE: Tensor
    flight: _Flight


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own_BE: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.rows_NE = own_BE.new_empty(len(own_BE) * dist.get_world_size(), *own_BE.shape[1:])
        flight.work = dist.all_gather_into_tensor(flight.rows_NE, own_BE.contiguous(), async_op=True)
        return own_BE.view_as(own_BE)

    @staticmethod
    def backward(ctx, grad_BE: Tensor) -> tuple[Tensor, None]:
        ctx.flight.work.wait()
        return grad_BE, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own_BE: Tensor, flight: _Flight) -> Tensor:
        ctx.flight, rows_NE = flight, flight.rows_NE
        flight.work.wait()
        flight.rows_NE = None
        return rows_NE

    @staticmethod
    def backward(ctx, grad_NE: Tensor) -> tuple[Tensor, None]:
        # Each rank's loss has a gradient for all rows: their sum goes to the rank that sent the row.
        grad_BE = grad_NE.new_empty(len(grad_NE) // dist.get_world_size(), *grad_NE.shape[1:])
        ctx.flight.work = dist.reduce_scatter_tensor(grad_BE, grad_NE.contiguous(), async_op=True)
        return grad_BE, None


def send(own_BE: Tensor) -> Sent | None:
    """Begin to give these rows to all ranks; every rank must call it, with equally many. None: there is one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return _send(own_BE)


def arrived(sent: Sent | None) -> Tensor | None:
    """The rows of all ranks [N, E], in rank order. The gradient of a row is summed over ranks, where it came from."""
    return None if sent is None else _arrive(sent)


# A compiled step is cut here: within one graph, the compiler's schedule would say when a collective begins and ends.
@torch.compiler.disable
def _send(own_BE: Tensor) -> Sent:
    flight = _Flight()
    return Sent(_Send.apply(own_BE, flight), flight)


@torch.compiler.disable
def _arrive(sent: Sent) -> Tensor:
    return _Arrive.apply(*sent)
