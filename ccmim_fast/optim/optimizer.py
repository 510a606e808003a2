"""Optimizers over timm's parameter groups; each updates all weights in one multi-tensor pass.

This is the only file that imports apex. The package index's `apex` is an unrelated web toolkit: so apex is no
dependency, and its contents are checked.
"""

import importlib
import math

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from ccmim_fast.errors import MachineError
from ccmim_fast.models.tokens import TOKENS

# Tokens and positions, learned frequencies of rotary ones among them, are no matrices: decay would pull them to zero
# like biases.
POSITIONS = ("pos_embed", "freqs")

BUILD = (
    "build NVIDIA's from source: git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation . (never `pip install apex`)"
)


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    decay_tokens: bool = False,
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """Return the optimizer `optim.name` over the weights of `model`; biases, norms and positions have no decay.

    Args:
        decay_tokens: tokens have it, too, as in MAE's and the authors' code.
        name: `adamw` (torch's, fused, on CPU and CUDA), `apex_adamw` or `apex_lamb` (CUDA, see `apex_optimizer`).
        lr: of the first step.
        capturable: for a CUDA graph: the rate is a device tensor, changed in place.
    """
    spared = POSITIONS if decay_tokens else (*POSITIONS, *TOKENS)
    exempt = [name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] in spared]
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    if name != "adamw":
        return apex_optimizer(name, groups, lr=lr, betas=tuple(betas), capturable=capturable)
    rate = torch.tensor(lr, device=next(model.parameters()).device) if capturable else lr
    # `capturable` is for the unfused kernels; the fused ones keep their step counts on the device anyhow.
    return torch.optim.AdamW(groups, lr=rate, betas=tuple(betas), fused=True, capturable=capturable)


def apex_optimizer(
    name: str, groups: list[dict], *, lr: float, betas: tuple[float, float], capturable: bool = False
) -> torch.optim.Optimizer:
    """Return `apex_adamw` (FusedAdam with decoupled decay) or `apex_lamb` (FusedLAMB), both for CUDA only.

    Raises MachineError where NVIDIA apex or its CUDA extensions are missing, or a CUDA graph cannot hold the optimizer.
    """
    try:
        optimizers = importlib.import_module("apex.optimizers")
        fused_adam, fused_lamb = optimizers.FusedAdam, optimizers.FusedLAMB
    except (ImportError, AttributeError):
        raise MachineError(f"optim.name={name}: NVIDIA apex is not installed; {BUILD}") from None
    if name == "apex_lamb" and capturable:
        raise MachineError("optim.name=apex_lamb: does not work with train.cuda_graph; use adamw or apex_adamw")
    try:
        if name == "apex_adamw":
            return fused_adam(groups, lr=lr, betas=betas, adam_w_mode=True, capturable=capturable)
        # It clips by itself unless told not to; clipping is `optim.clip_grad`'s.
        return fused_lamb(groups, lr=lr, betas=betas, max_grad_norm=math.inf)
    except RuntimeError as error:
        raise MachineError(f"optim.name={name}: apex lacks its CUDA extensions ({error}); {BUILD}") from None
