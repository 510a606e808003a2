"""The update of a step: learning rate, norms, clipping, and no update where gradients are not finite.

Nothing here waits for the device, except for an optimizer that takes no flag from the device.
"""

# P parts of the model

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def own_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that FSDP has divided, or any other tensor: the same memory, no gradient."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


class Gradients(NamedTuple):
    """Figures of a step's gradients, on the device, float32, unscaled and before clipping."""

    norm: Tensor  # of all gradients
    norms_P: Tensor  # of each part's
    # Bool, True if they are not finite; under a scaler, which tries too large scales on purpose, only once its is 1.
    bad: Tensor


def guard(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parts: Sequence[Sequence[nn.Parameter]],
    limit: float = 0.0,
) -> Gradients:
    """Make the next `update` use gradients of norm `limit` at most (0: any norm), and skip those that are not finite.

    The result equals `nn.utils.clip_grad_norm_` before the step. A fused optimizer of torch divides by `grad_scale` as
    it reads the gradients, and leaves weights and moments alone where `found_inf` is 1: so gradients are read once
    more, and not written. Other optimizers' gradients, and those under a scaler (which sets both itself), are clipped
    in place. `parts` are all parameters of the optimizer, in P parts.
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

    apex's kernels take no flag from the device, so the host waits for `bad`; within a CUDA graph, where waiting is
    impossible, they take the step whatever the gradients are.
    """
    if scaler.is_enabled() or _reads_scale(optimizer):
        scaler.step(optimizer)
        scaler.update()
    elif (bad.is_cuda and torch.cuda.is_current_stream_capturing()) or not bad.item():
        optimizer.step()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of all groups, times their `lr_scale`, without waiting for the device where it is a tensor there."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Set all gradients to None; apex's optimizers lack `zero_grad(set_to_none=True)`."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _reads_scale(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if its kernels read `grad_scale` and `found_inf`; apex's claim it, but read something else."""
    return isinstance(optimizer, torch.optim.AdamW) and getattr(optimizer, "_step_supports_amp_scaling", False)


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """Return the rate by the linear scaling rule: `base_lr` is per 256 images of the optimizer step's batch."""
    return base_lr * batch_size / 256


def lr_at(
    epoch: float,
    *,
    peak: float,
    floor: float,
    warmup: float,
    epochs: float,
    shape: Literal["cosine", "poly", "steps"] = "cosine",
    milestones: Sequence[float] = (),
) -> float:
    """Return the rate at a fractional epoch.

    `cosine` rises from 0 to `peak` over `warmup` epochs, then falls to `floor` at `epochs` by half a cosine. The others
    fall from epoch 0 on, and a linear warm-up from 0 multiplies them, as in mmcv: `poly` linearly to `floor` (power 1),
    `steps` to a tenth at each milestone, a share of the run.
    """
    if shape == "cosine":
        if epoch < warmup:
            return peak * epoch / warmup
        progress = (epoch - warmup) / max(epochs - warmup, 1e-12)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    progress = min(epoch / epochs, 1.0)
    if shape == "poly":
        rate = floor + (peak - floor) * (1 - progress)
    else:
        rate = peak * 0.1 ** sum(progress >= milestone for milestone in milestones)
    return rate * min(epoch / warmup, 1.0) if warmup else rate
