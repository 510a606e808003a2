"""A safetensors file holds weights under timm's names or under our own, and tells of its run: all but its folders."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ccmim_fast.checkpoints.convert import to_timm
from ccmim_fast.checkpoints.run import OpenedRun
from ccmim_fast.checkpoints.weight_files import WEIGHTS
from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.load import to_yaml
from ccmim_fast.config.schema import Config
from ccmim_fast.errors import CheckpointError, ConfigError
from ccmim_fast.evaluation.classifier import OpenedClassifier
from ccmim_fast.export.timm_model import rebuilds, timm_model
from ccmim_fast.models.tokens import patch_size_of


class Images(Protocol):
    """What the settings say of the images' numbers: `DataConfig`, or `Weights`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_value: tuple[float, ...]


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
    config = run.config
    facts = facts_of(run, run.model.encoder, config.model.arch, config.model.positions, config.data, timm_model(config))
    return facts | {"method": method(config)}


def facts_of(
    of: OpenedRun | OpenedClassifier,
    vit: nn.Module,
    arch: str,
    positions: str,
    images: Images,
    form: tuple[str, dict[str, Any]],
) -> dict[str, str]:
    """Return what the files of a run and of a classifier carry alike; `form` is timm's name and arguments of `vit`."""
    name, arguments = form
    return {
        "format": "pt",
        "arch": arch,
        "timm_arch": name,
        "timm_arguments": json.dumps(arguments),
        "positions": positions,
        "image_size": json.dumps(list(of.config.data.image_size)),
        "patch_size": str(patch_size_of(vit)),
        "prefix_tokens": str(vit.num_prefix_tokens),
        "mean": json.dumps(list(images.mean)),
        "std": json.dumps(list(images.std)),
        "max_value": json.dumps(list(images.max_value)),
        "step": str(of.step),
        "averaged_weights": str(of.averaged).lower(),
        "ccmim_fast_commit": commit_of(of.folder),
        "settings": to_yaml(public(of.config)),
    }


def export_timm(run: OpenedRun, out: Path) -> list[Path]:
    """Write the encoder for `timm.create_model(timm_arch, num_classes=0, checkpoint_path=FILE, **timm_arguments)`.

    A folder gets a config.json, too: `timm.create_model("local-dir:FOLDER", pretrained=True)` then needs no more, nor
    does `hf-hub:OWNER/NAME` once it is pushed. Raises ConfigError where timm cannot build the encoder.
    """
    vit, data, model = run.model.encoder, run.config.data, run.config.model
    name, arguments = timm_model(run.config)
    if name != model.arch and not rebuilds(vit, name, arguments | {"drop_path_rate": model.drop_path}):
        raise not_timms(model.arch)
    preprocessing = timm_preprocessing(data.image_size, data, crop_pct=1.0, crop_mode="squash")
    config = timm_config(name, vit, arguments, preprocessing)
    return write_timm(to_timm(run.model.state_dict()), about(run), config, out)


def not_timms(arch: str) -> ConfigError:
    """Return the error for a module that no arguments in JSON let timm build."""
    reason = f"timm has no arguments that build {arch} with these settings"
    return ConfigError(f"ccmim export timm: {reason}; take safetensors, onnx or torch-export")


def write_timm(weights: dict[str, Tensor], facts: dict[str, str], config: dict[str, Any], out: Path) -> list[Path]:
    """Write weights with `facts` as the file `out`, or into the folder `out`, with config.json beside them."""
    file = write_weights(weights, facts, out)
    return [file] if file == out else [file, write_json(out / "config.json", config)]


def timm_config(arch: str, vit: nn.Module, arguments: dict[str, Any], preprocessing: dict[str, Any]) -> dict[str, Any]:
    """Return what a folder's config.json tells timm: how to build the module, and how images are prepared."""
    heads = ["head", "head_dist"] if hasattr(vit, "head_dist") else "head"  # that start anew for other classes
    return {
        "architecture": arch,
        "num_classes": vit.num_classes,
        "num_features": vit.num_features,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": preprocessing
        | {"num_classes": vit.num_classes, "first_conv": "patch_embed.proj", "classifier": heads},
    }


def timm_preprocessing(image_size: tuple[int, int], images: Images, **crop: Any) -> dict[str, Any]:
    """Return the preparation of images under timm's names; `crop` is `crop_pct`, a share, and `crop_mode`."""
    return {
        "input_size": [len(images.mean), *image_size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        **crop,
        "mean": list(images.mean),
        "std": list(images.std),
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
