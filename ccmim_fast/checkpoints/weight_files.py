"""This file reads files of weights, and the folders that transformers and timm write, with what they tell."""

import argparse
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ccmim_fast.checkpoints.manifest import CHECKPOINTS
from ccmim_fast.checkpoints.told import Told, of_export, of_timm, of_transformers
from ccmim_fast.errors import CheckpointError, one_line

WEIGHTS = "model.safetensors"  # in a folder of transformers, of timm, or of ours
_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_PICKLED = "pytorch_model.bin"  # of older versions
_SHARDS = f"{WEIGHTS}.index.json"


def read_file(name: str) -> tuple[Mapping[str, Any], Told]:
    """Read a `.safetensors` file, or a pickled one, of which no code is run. Raises CheckpointError."""
    if name.endswith(".index.json"):
        raise CheckpointError(f"{name}: tells which files hold the weights; name its folder {str(Path(name).parent)!r}")
    if not name.endswith(".safetensors"):
        return _pickled(name), Told()
    weights, about = read_safetensors(name)
    try:
        return weights, of_export(about)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise CheckpointError(
            f"{name}: what it tells of itself is damaged; expected what ccmim export writes"
        ) from None


def is_model_folder(folder: Path) -> bool:
    """Tell whether transformers, timm or `ccmim export` wrote a folder, which without config.json is the last."""
    names = (WEIGHTS, _SHARDS, _PICKLED) if (folder / _CONFIG).is_file() else (WEIGHTS,)
    return not (folder / CHECKPOINTS).is_dir() and any((folder / name).is_file() for name in names)


def read_folder(folder: Path) -> tuple[Mapping[str, Any], Told]:
    """Read a folder that transformers, timm or `ccmim export` wrote. Raises CheckpointError."""
    names = [WEIGHTS]
    if not any((folder / name).is_file() for name in (WEIGHTS, _SHARDS)):
        names = [_PICKLED]
    elif not (folder / WEIGHTS).is_file():
        # Names of files in the folder, wherever the index says they are.
        names = sorted({Path(str(name)).name for name in _json(folder / _SHARDS, "weight_map").values()})
    weights: dict[str, Tensor] = {}
    of_file = Told()
    for name in names:
        found, of_file = read_file(str(folder / name))
        weights |= found
    if of_file.arch or not (folder / _CONFIG).is_file():  # an export of ours, which tells more than a config.json
        return weights, of_file
    config, preparation = _json(folder / _CONFIG), {}
    if (folder / _PREPROCESSOR).is_file():
        preparation = _json(folder / _PREPROCESSOR)
    try:
        told = of_timm(config) if "architecture" in config else of_transformers(config, preparation)
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise CheckpointError(f"{folder / _CONFIG}: what it tells of the model is damaged") from None
    return weights, told


def _json(path: Path, key: str = "") -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        found = found[key] if key else found
        if isinstance(found, dict):
            return found
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    raise CheckpointError(f"{path}: cannot be read; expected what transformers or timm writes")


def read_safetensors(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a file, and the texts that it tells of itself. Raises CheckpointError."""
    try:
        with safe_open(name, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{name}: cannot be read as weights: {one_line(error)}") from None


def _pickled(name: str) -> dict[str, Any]:
    """Read a `.pth` file; only tensors and plain containers are accepted, code in it never runs."""
    try:
        # MAE's training checkpoints carry their command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol
            found = torch.load(name, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read as weights: {one_line(error)}") from None
    except pickle.UnpicklingError:  # torch's words advise to run what is in the file
        reason = (
            "it is damaged, or holds more than tensors and plain containers, as a whole model; save its state_dict()"
        )
        raise CheckpointError(f"{name}: cannot be read as weights: {reason}") from None
    except Exception as error:  # torch.load raises many kinds on damaged input
        reason = f"it is cut short, or no file of torch ({type(error).__name__})"
        raise CheckpointError(f"{name}: cannot be read as weights: {reason}") from None
    return found if isinstance(found, dict) else {}
