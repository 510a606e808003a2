"""What a checkpoint holds: everything a run needs to go on as if it had never stopped.

The random numbers of a run are keyed by (seed, epoch, sample id) or by the step, so no generator's state is kept: the
number of the next step says where every one of them stands.
"""

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ccmim_fast.config.load import to_yaml
from ccmim_fast.config.schema import Config
from ccmim_fast.errors import CheckpointError


def capture(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: AveragedModel | None,
    step: int,
    config: Config,
) -> dict[str, Any]:
    """Plain dictionaries and tensors; `step` counts finished optimizer steps."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "ema": None if ema is None else ema.state_dict(),
        "step": step,
        "config": to_yaml(config),
    }


def restore(
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: AveragedModel | None,
) -> int:
    """Load `state` into the objects; returns the number of finished optimizer steps.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if ema is not None:
            # A run that starts averaging only now averages from these weights on.
            if state["ema"] is None:
                ema.module.load_state_dict(state["model"])
            else:
                ema.load_state_dict(state["ema"])
        return int(state["step"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the checkpoint is of another model: {reason[:300]}") from None
