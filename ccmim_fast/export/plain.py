"""A safetensors file holds weights under timm's names or under our own, and tells of its run: all but its folders."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ccmim_fast.checkpoints.convert import to_timm
from ccmim_fast.checkpoints.run import OpenedRun
from ccmim_fast.checkpoints.weight_files import WEIGHTS
from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.load import to_yaml
from ccmim_fast.config.schema import Config
from ccmim_fast.errors import CheckpointError, ConfigError
from ccmim_fast.export.timm_model import rebuilds, timm_model
from ccmim_fast.models.tokens import patch_size_of


def public(config: Config | EvalConfig) -> Config | EvalConfig:
    """Return the settings without the folders of the machine, which are nobody else's business."""
    places = {key: "" for key in ("root", "index", "test") if hasattr(config.data, key)}
    return dataclasses.replace(config, run=type(config.run)(), data=dataclasses.replace(config.data, **places))


def method(config: Config) -> str:
    """Return MAE or ccMIM."""
    return "MAE" if config.contrast.loss == "none" and config.mask.strategy == "random" else "ccMIM"


def commit_of(folder: Path) -> str:
    """Return the commit that the run noted; `unknown` where it noted none."""
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError, RecursionError):
        return str(json.loads((folder / "environment.json").read_text())["commit"])
    return "unknown"


def about(run: OpenedRun) -> dict[str, str]:
    """Return what every exported file carries, texts by name; what is no word or number is JSON."""
    vit, data = run.model.encoder, run.config.data
    name, arguments = timm_model(run.config)
    return {
        "format": "pt",
        "method": method(run.config),
        "arch": run.config.model.arch,
        "timm_arch": name,
        "timm_arguments": json.dumps(arguments),
        "positions": run.config.model.positions,
        "image_size": json.dumps(list(data.image_size)),
        "patch_size": str(patch_size_of(vit)),
        "prefix_tokens": str(vit.num_prefix_tokens),
        "mean": json.dumps(list(data.mean)),
        "std": json.dumps(list(data.std)),
        "max_value": json.dumps(list(data.max_value)),
        "step": str(run.step),
        "averaged_weights": str(run.averaged).lower(),
        "ccmim_fast_commit": commit_of(run.folder),
        "settings": to_yaml(public(run.config)),
    }


def export_timm(run: OpenedRun, out: Path) -> list[Path]:
    """Write the encoder for `timm.create_model(timm_arch, num_classes=0, checkpoint_path=FILE, **timm_arguments)`.

    A folder gets a config.json, too: `timm.create_model("local-dir:FOLDER", pretrained=True)` then needs no more, nor
    does `hf-hub:OWNER/NAME` once it is pushed. Raises ConfigError where timm has no name for the encoder's MLP.
    """
    name, arguments = timm_model(run.config)
    dropping = {"drop_path_rate": run.config.model.drop_path}
    if name != run.config.model.arch and not rebuilds(run.model.encoder, name, arguments | dropping):
        reason = f"timm has no name that builds {run.config.model.arch} with model.mlp={run.config.model.mlp}"
        raise ConfigError(f"ccmim export timm: {reason}; take safetensors, onnx or torch-export")
    file = write_weights(to_timm(run.model.state_dict()), about(run), out)
    if file == out:
        return [file]
    data, vit = run.config.data, run.model.encoder
    shown = timm_images(data.image_size, data.mean, data.std, crop_pct=1.0, crop_mode="squash")
    config = timm_config(name, vit, arguments, shown)
    return [file, write_json(out / "config.json", config)]


def timm_config(arch: str, vit: VisionTransformer, arguments: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
    """Return what a folder's config.json tells timm: how to build the module, and how `images` are prepared."""
    return {
        "architecture": arch,
        "num_classes": vit.num_classes,
        "num_features": vit.num_features,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": images
        | {"num_classes": vit.num_classes, "first_conv": "patch_embed.proj", "classifier": "head"},
    }


def timm_images(
    image_size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...], **crop: Any
) -> dict[str, Any]:
    """Return the preparation of images under timm's names; `crop` is `crop_pct`, a share, and `crop_mode`."""
    return {
        "input_size": [len(mean), *image_size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        **crop,
        "mean": list(mean),
        "std": list(std),
    }


def export_safetensors(run: OpenedRun, out: Path) -> list[Path]:
    """Write all weights under our own names: encoder, decoder and heads."""
    return [write_weights(run.model.state_dict(), about(run), out)]


def write_weights(weights: dict[str, Tensor], metadata: dict[str, str], out: Path) -> Path:
    """Write the file `out`, or model.safetensors in the folder `out`. Raises CheckpointError: not written."""
    file = out / WEIGHTS if out.is_dir() else out
    try:
        save_file({name: value.contiguous() for name, value in weights.items()}, file, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not written: {error}") from None
    return file


def write_json(path: Path, content: dict) -> Path:
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
