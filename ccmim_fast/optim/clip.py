"""Gradient clipping that costs one read of the gradients: the fused update itself scales them."""

import torch
from torch import Tensor, nn


def clip(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, limit: float) -> Tensor:
    """Make the next update see gradients of norm `limit` at most; returns their norm before, unscaled, on the device.

    Equal to `nn.utils.clip_grad_norm_` before the step. A fused optimizer of torch divides by `grad_scale` as it reads
    the gradients, so they are not written once more. Other optimizers, and gradients under a scaler (which sets
    `grad_scale` itself), are clipped in place.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if scaler.is_enabled() or not getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)
        return nn.utils.clip_grad_norm_(parameters, limit)
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    optimizer.grad_scale, optimizer.found_inf = (norm / limit).clamp(min=1), torch.zeros_like(norm)
    return norm
