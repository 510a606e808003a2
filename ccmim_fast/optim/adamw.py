"""AdamW over timm's parameter groups."""

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

# Tokens and positions are no matrices: decay would pull them to zero like biases.
NO_DECAY = ("cls_token", "reg_token", "mask_token", "pos_embed")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices and kernels with `weight_decay`; biases, norms and tokens without."""
    exempt = [name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] in NO_DECAY]
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)


def build_adamw(model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """torch's fused AdamW: one pass over all tensors, on CPU and CUDA."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=tuple(betas), fused=True)
