"""Optimizers over timm's parameter groups; each updates all weights in one multi-tensor pass."""

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from ccmim_fast.optim.apex import apex_optimizer

# Tokens and positions are no matrices: decay would pull them to zero like biases.
NO_DECAY = ("cls_token", "reg_token", "mask_token", "pos_embed")


def build_optimizer(
    name: str, model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], capturable: bool = False
) -> torch.optim.Optimizer:
    """Return the optimizer `optim.name` over the weights of `model`.

    Args:
        name: `adamw` (torch's, fused, on CPU and CUDA), `apex_adamw` or `apex_lamb` (CUDA, see `optim.apex`).
        lr: of the first step.
        weight_decay: of matrices and kernels; biases, norms and tokens have none.
        capturable: for a CUDA graph: the rate is a device tensor, changed in place.

    Raises:
        MachineError: apex is asked for and not installed.
    """
    exempt = [name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] in NO_DECAY]
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    if name != "adamw":
        return apex_optimizer(name, groups, lr=lr, betas=tuple(betas), capturable=capturable)
    rate = torch.tensor(lr, device=next(model.parameters()).device) if capturable else lr
    # `capturable` is for the unfused kernels; the fused ones keep their step counts on the device anyhow.
    return torch.optim.AdamW(groups, lr=rate, betas=tuple(betas), fused=True, capturable=capturable)
