"""Between the backward pass and the update: norms, clipping, and no update where gradients are not finite.

Nothing here waits for the device, but for an optimizer that cannot be told by a tensor.
"""

# P parts of the model

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def own_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that FSDP has divided, or any other tensor: the same memory, no gradient."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


class Gradients(NamedTuple):
    """On the device, float32, unscaled and before clipping.

    Attributes:
        norm: of all gradients.
        norms_P: of those of each part.
        bad: bool, they are not finite; under a scaler only once its scale is down to 1, as it tries too large ones on
            purpose.
    """

    norm: Tensor
    norms_P: Tensor
    bad: Tensor


def guard(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parts: Sequence[Sequence[nn.Parameter]],
    limit: float = 0.0,
) -> Gradients:
    """Have the next `update` see gradients of norm `limit` at most (0: as they are), and none that are not finite.

    Equal to `nn.utils.clip_grad_norm_` before the step. A fused optimizer of torch divides by `grad_scale` as it reads
    the gradients, and leaves weights and moments alone where `found_inf` is 1: so gradients are read once more, and not
    written. Those of other optimizers, and those under a scaler (which sets both itself), are clipped in place.

    Args:
        parts: all parameters of the optimizer, in P parts.
    """
    if scaler.is_enabled() and limit:
        scaler.unscale_(optimizer)
    gradients = [[p.grad for p in part if p.grad is not None] for part in parts]
    norms_P = torch.stack([nn.utils.get_total_norm([own_part(grad) for grad in part]) for part in gradients])
    if any(isinstance(grad, DTensor) for part in gradients for grad in part):
        squares_P = norms_P.square()  # each rank has a share of every gradient
        dist.all_reduce(squares_P)
        norms_P = squares_P.sqrt()
    scale = scaler.scale(torch.ones_like(norms_P[0]))
    if scaler.is_enabled() and not limit:
        norms_P = norms_P / scale
    norm = norms_P.norm()
    bad = ~norm.isfinite() & (scale <= 1)
    if _reads_scale(optimizer) and not scaler.is_enabled():
        optimizer.found_inf = bad.float()
        optimizer.grad_scale = (norm / limit).clamp(min=1) if limit else None
    elif limit:
        nn.utils.clip_grads_with_norm_([p for part in parts for p in part], limit, norm)
    return Gradients(norm, norms_P, bad)


def update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, bad: Tensor) -> None:
    """Take the step that `guard` prepared, or none.

    apex's kernels cannot be told by a tensor: the host waits for `bad`. Within a CUDA graph, where nobody can wait,
    they take the step whatever the gradients are.
    """
    if scaler.is_enabled() or _reads_scale(optimizer):
        scaler.step(optimizer)
        scaler.update()
    elif _is_capturing(bad) or not bad.item():
        optimizer.step()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of all groups, without waiting for the device where it is a tensor there."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """As `zero_grad(set_to_none=True)`, which apex's optimizers do not know."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _reads_scale(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its kernels read `grad_scale` and `found_inf`; apex's says so of itself and reads something else."""
    return isinstance(optimizer, torch.optim.AdamW) and getattr(optimizer, "_step_supports_amp_scaling", False)


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
