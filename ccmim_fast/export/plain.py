"""A safetensors file holds weights under timm's names or under our own, and says what is in it."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ccmim_fast.checkpoints.convert import to_timm
from ccmim_fast.checkpoints.run import OpenedRun
from ccmim_fast.errors import CheckpointError
from ccmim_fast.export.about import about, timm_arguments

WEIGHTS = "model.safetensors"


def export_timm(run: OpenedRun, out: Path) -> list[Path]:
    """Write the encoder for `timm.create_model(arch, num_classes=0, checkpoint_path=FILE, **timm_arguments)`.

    A folder gets a config.json, too: `timm.create_model("local-dir:FOLDER", pretrained=True)` then needs no more, nor
    does `hf-hub:OWNER/NAME` once it is pushed.
    """
    file = write_weights(to_timm(run.model.state_dict()), about(run), out)
    if file == out:
        return [file]
    height, width = run.config.data.image_size
    config = {
        "architecture": run.config.model.arch,
        "num_classes": 0,
        "num_features": run.model.encoder.num_features,
        "global_pool": "token",
        "model_args": timm_arguments(run.config),
        "pretrained_cfg": {
            "input_size": [run.config.data.channels, height, width],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": list(run.config.data.mean),
            "std": list(run.config.data.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return [file, write_json(out / "config.json", config)]


def export_safetensors(run: OpenedRun, out: Path) -> list[Path]:
    """Write all weights under our own names: encoder, decoder and heads."""
    return [write_weights(run.model.state_dict(), about(run), out)]


def write_weights(weights: dict[str, Tensor], about: dict[str, str], out: Path) -> Path:
    """Write the file `out`, or model.safetensors in the folder `out`. Raises CheckpointError: not written."""
    file = out / WEIGHTS if out.is_dir() else out
    try:
        save_file({name: value.contiguous() for name, value in weights.items()}, file, metadata=about)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not written: {error}") from None
    return file


def write_json(path: Path, content: dict) -> Path:
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
