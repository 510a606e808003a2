"""Weights under timm's names, and under our own: a safetensors file that says what is in it."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ccmim_fast.checkpoints.convert import to_timm
from ccmim_fast.errors import CheckpointError
from ccmim_fast.export.trained import Trained

WEIGHTS = "model.safetensors"


def export_timm(trained: Trained, out: Path) -> list[Path]:
    """The encoder for `timm.create_model(arch, num_classes=0, checkpoint_path=FILE, **timm_arguments)`.

    In a folder stands a config.json beside it, by which `timm.create_model("local-dir:FOLDER", pretrained=True)` needs
    no more, nor does `hf-hub:OWNER/NAME` once it is pushed.
    """
    file = write_weights(to_timm(trained.model.state_dict()), trained.about(), out)
    if file == out:
        return [file]
    height, width = trained.config.data.image_size
    config = {
        "architecture": trained.config.model.arch,
        "num_classes": 0,
        "num_features": trained.model.encoder.num_features,
        "global_pool": "token",
        "model_args": trained.timm_arguments(),
        "pretrained_cfg": {
            "input_size": [trained.config.data.channels, height, width],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": list(trained.config.data.mean),
            "std": list(trained.config.data.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return [file, write_json(out / "config.json", config)]


def export_safetensors(trained: Trained, out: Path) -> list[Path]:
    """All weights, under our own names: encoder, decoder and heads."""
    return [write_weights(trained.model.state_dict(), trained.about(), out)]


def write_weights(weights: dict[str, Tensor], about: dict[str, str], out: Path) -> Path:
    """Write the file `out`, or model.safetensors in the folder `out`, which is there.

    Raises:
        CheckpointError: it cannot be written.
    """
    file = out / WEIGHTS if out.is_dir() else out
    try:
        save_file({name: value.contiguous() for name, value in weights.items()}, file, metadata=about)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not written: {error}") from None
    return file


def write_json(path: Path, content: dict) -> Path:
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
