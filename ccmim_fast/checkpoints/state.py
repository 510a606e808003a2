"""A checkpoint holds everything that a run needs to go on as if it had never stopped.

The random numbers of a run are keyed by (seed, epoch, sample id) or by the step, so no generator's state is kept: the
place in the stream of samples says where every one of them stands.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.load import to_yaml
from ccmim_fast.config.schema import Config
from ccmim_fast.errors import CheckpointError, one_line


class Progress(NamedTuple):
    """This tuple says how far a run is."""

    step: int  # finished optimizer steps
    seen: int  # places of the stream of samples that are behind it, over all ranks: the data cursor
    samples: int  # of an epoch
    images: str  # fingerprint of the set of images, see `Source`
    shards: int = 1  # of the stream, see `Plan`


def capture(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: AveragedModel | None,
    progress: Progress,
    config: Config | EvalConfig,
) -> dict[str, Any]:
    """Return plain dictionaries and tensors, DTensors of what is divided."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "ema": None if ema is None else ema.state_dict(),
        "progress": progress._asdict(),
        "config": to_yaml(config),
    }


def patterns(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return, by its path in a state, each tensor that is divided among ranks, for `distributed.read`."""
    named = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    found = {f"{where}{name}": p for name, p in named.items() for where in ("model/", "ema/module.")}
    trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return found | {f"optimizer/state/{index}": p for index, p in enumerate(trained) if isinstance(p, DTensor)}


def restore(
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: AveragedModel | None,
    in_place: bool = False,
) -> Progress:
    """Load `state` into the objects and return how far it was; raises CheckpointError if it is of another model.

    With `in_place` the optimizer, which has taken steps, keeps its tensors: a CUDA graph knows their addresses.
    """
    try:
        model.load_state_dict(state["model"])
        _check_moments(state["optimizer"], optimizer)
        if in_place:
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            for index, parameter in enumerate(parameters):
                for name, value in optimizer.state[parameter].items():
                    value.copy_(state["optimizer"]["state"][index][name])
        else:
            # All but the rate, the decay and the like, which are the run's own (a graph may read their tensors).
            before = [dict(group) for group in optimizer.param_groups]
            optimizer.load_state_dict(state["optimizer"])
            for group, own in zip(optimizer.param_groups, before):
                group.update({key: value for key, value in own.items() if key not in ("params", "step")})
        if not all(isinstance(value, int | float) for value in state["scaler"].values()):
            raise TypeError(f"the loss scaling is {state['scaler']!r:.200}")
        if state["scaler"]:  # empty where nothing was scaled
            scaler.load_state_dict(state["scaler"])
        if ema is not None:
            # A run that starts averaging only now averages from these weights on.
            if state["ema"] is None:
                ema.module.load_state_dict(state["model"])
            else:
                ema.load_state_dict(state["ema"])
        return _progress(state["progress"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"the checkpoint is of another model: {one_line(error, 300)}") from None


def _check_moments(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless each tensor of an optimizer's state has its parameter's shape, or is one number.

    torch's fused kernels take the shapes for granted, and read beyond a smaller tensor.
    """
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = [index for group in state["param_groups"] for index in group["params"]]
    if len(own) != len(saved):
        raise ValueError(f"the optimizer has {len(own)} parameters, the checkpoint {len(saved)}")
    if unknown := state["state"].keys() - set(saved):
        raise ValueError(f"moments of parameters that there are not: {sorted(unknown, key=str)[:3]}")
    for index, parameter in zip(saved, own):
        for name, value in state["state"].get(index, {}).items():
            if not isinstance(value, Tensor):
                if not isinstance(value, int | float | None):
                    raise TypeError(f"{name} of parameter {index} is a {type(value).__name__}")
                continue
            fits = value.numel() == 1 if name == "step" else value.shape == parameter.shape
            if not fits or not value.is_floating_point():
                kind = f"{tuple(value.shape)} {value.dtype}"
                raise ValueError(f"{name} of parameter {index} is {kind}, expected {tuple(parameter.shape)}")


def _progress(told: dict[str, Any]) -> Progress:
    found = Progress(**told)
    counts = (found.step, found.seen, found.samples, found.shards)
    if not all(type(count) is int and count >= 0 for count in counts) or not isinstance(found.images, str):
        raise ValueError(f"progress={told!r:.200} must hold whole numbers from 0 on")
    return found
