"""NVIDIA apex's fused optimizers, where apex was built. This is the only file that imports apex.

The package index's `apex` is an unrelated web toolkit: so apex is no dependency, and its contents are checked.
"""

import importlib
import math

import torch

from ccmim_fast.errors import MachineError

BUILD = (
    "build NVIDIA's from source: git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation . (never `pip install apex`)"
)


def apex_optimizer(
    name: str, groups: list[dict], *, lr: float, betas: tuple[float, float], capturable: bool = False
) -> torch.optim.Optimizer:
    """Return `apex_adamw` (FusedAdam with decoupled decay) or `apex_lamb` (FusedLAMB), both for CUDA only.

    Raises:
        MachineError: NVIDIA apex with its CUDA extensions is not installed, or a CUDA graph cannot hold the optimizer.
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
