"""This file reads files of weights, and the folders that transformers and timm write, with what they tell."""

import argparse
import json
import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ccmim_fast.errors import CheckpointError, one_line

OF_WIDTH = {  # timm's plain ViTs, by width: patch and blocks are read off the weights
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
    1408: "vit_giant_patch14_224",
    1664: "vit_gigantic_patch14_224",
}
_SIZES = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
_DINOV2 = {"dinov2": "vit_{}_patch14_dinov2", "dinov2_with_registers": "vit_{}_patch14_reg4_dinov2"}
_DINOV3 = "dinov3_vit"  # whose weights tell the architecture
WEIGHTS = "model.safetensors"  # in a folder of transformers, of timm, or of ours
_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_PICKLED = "pytorch_model.bin"  # of older versions
_SHARDS = f"{WEIGHTS}.index.json"


class Told(NamedTuple):
    """What a file tells of its weights, as the fields of `published.Weights` of these names."""

    arch: str = ""
    num_heads: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    image_size: tuple[int, ...] = ()
    max_value: tuple[float, ...] = ()
    layer_scale: float = 0.0
    positions: str = ""
    mlp: str = ""


def read_file(name: str) -> tuple[Mapping[str, Any], Told]:
    """Read a `.safetensors` file, or a pickled one, of which no code is run. Raises CheckpointError."""
    if not name.endswith(".safetensors"):
        return _pickled(name), Told()
    weights, about = read_safetensors(name)
    try:
        arguments = json.loads(about.get("timm_arguments", "{}"))
        heads, size = int(arguments.get("num_heads", 0)), tuple(map(int, arguments.get("img_size", ())))
        keys = ("mean", "std", "max_value")
        mean, std, white = (tuple(map(float, json.loads(about.get(key, "[]")))) for key in keys)
        scale, positions = float(arguments.get("init_values", 0)), about.get("positions", "sincos")
        if len(size) not in (0, 2) or min(white, default=1) <= 0 or not 0 <= scale < math.inf:
            raise ValueError(size, white, scale)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise CheckpointError(
            f"{name}: what it tells of itself is damaged; expected what ccmim export writes"
        ) from None
    positions, mlp = "" if positions == "sincos" else positions, "gelu" if arguments.get("act_layer") == "gelu" else ""
    return weights, Told(about.get("arch", ""), heads, mean, std, size, white, scale, positions, mlp)


def is_model_folder(folder: Path) -> bool:
    """Tell whether transformers or timm wrote a folder."""
    names = (WEIGHTS, _SHARDS, _PICKLED)
    return (folder / _CONFIG).is_file() and any((folder / name).is_file() for name in names)


def read_folder(folder: Path) -> tuple[Mapping[str, Any], Told]:
    """Read a folder that transformers or timm wrote. Raises CheckpointError."""
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
    config, preparation = _json(folder / _CONFIG), {}
    if of_file.arch:  # an export of ours, which tells more than its config.json
        return weights, of_file
    if (folder / _PREPROCESSOR).is_file():
        preparation = _json(folder / _PREPROCESSOR)
    try:
        told = _of_timm(config) if "architecture" in config else _of_transformers(config, preparation)
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise CheckpointError(f"{folder / _CONFIG}: what it tells of the model is damaged") from None
    return weights, told


def _of_timm(config: dict[str, Any]) -> Told:
    of_images, arguments = config.get("pretrained_cfg", {}), config.get("model_args", {})
    mean, std = (tuple(map(float, of_images.get(key, ()))) for key in ("mean", "std"))
    heads, size = int(arguments.get("num_heads", 0)), arguments.get("img_size") or of_images.get("input_size", ())[1:]
    return Told(str(config["architecture"]), heads, mean, std, _pair(size))


def _of_transformers(config: dict[str, Any], preparation: dict[str, Any]) -> Told:
    width, kind = int(config.get("hidden_size", 0)), config.get("model_type", "")
    arch = "" if kind == _DINOV3 else OF_WIDTH.get(width, "")
    if kind in _DINOV2:
        arch = _DINOV2[kind].format(_SIZES[width]) if width in _SIZES else ""
    mean, std = (tuple(map(float, preparation.get(f"image_{key}") or ())) for key in ("mean", "std"))
    return Told(arch, int(config.get("num_attention_heads", 0)), mean, std, _pair(config.get("image_size") or ()))


def _pair(size: Any) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(map(int, size))


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
