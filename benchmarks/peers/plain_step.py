"""What the peers' steps have in common: their images, and forward, backward and update as they document it."""

# B batch, H height, W width, C channels

from collections.abc import Callable

import torch
from contenders import LR
from torch import Tensor, nn

from ccmim_fast.config.schema import DataConfig, OptimConfig
from ccmim_fast.models.precision import choose_precision
from ccmim_fast.optim.optimizer import build_optimizer


def normalised(images_BHWC: Tensor) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] with ImageNet's mean and deviation, as the peers' loaders yield them.

    Done once, outside of the clock: a loader's workers would do it.
    """
    mean_C, std_C = (torch.tensor(values, device=images_BHWC.device) for values in (DataConfig.mean, DataConfig.std))
    return ((images_BHWC / 255 - mean_C) / std_C).permute(0, 3, 1, 2).contiguous()


def plain_step(model: nn.Module, loss_of: Callable[[], Tensor], precision: str) -> Callable[[], Tensor]:
    """One training step of `model`: `loss_of` under autocast, backward, the trainer's AdamW, gradients zeroed."""
    device = next(model.parameters()).device
    chosen = choose_precision(precision, device)
    optimizer = build_optimizer("adamw", model, lr=LR, weight_decay=OptimConfig.weight_decay, betas=OptimConfig.betas)
    scaler = torch.amp.GradScaler(device.type, enabled=chosen.scaled)

    def step() -> Tensor:
        with chosen.autocast(device):
            loss = loss_of()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
