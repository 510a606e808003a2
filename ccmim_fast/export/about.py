"""An exported file tells of its run: sizes, method, settings, commit, but no folder of the machine."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from ccmim_fast.checkpoints.run import OpenedRun
from ccmim_fast.config.load import to_yaml
from ccmim_fast.config.schema import Config, RunConfig
from ccmim_fast.models.tokens import patch_size_of


def public(config: Config) -> Config:
    """Return the settings without the folders of the machine, which are nobody else's business."""
    return dataclasses.replace(config, run=RunConfig(), data=dataclasses.replace(config.data, root="", index=""))


def method(config: Config) -> str:
    """Return MAE or ccMIM."""
    return "MAE" if config.contrast.loss == "none" and config.mask.strategy == "random" else "ccMIM"


def timm_arguments(config: Config) -> dict[str, Any]:
    """Return what `timm.create_model` needs beside the architecture's name to build the encoder."""
    sizes = {key: getattr(config.model, key) for key in ("patch_size", "embed_dim", "depth", "num_heads")}
    fixed = {"img_size": list(config.data.image_size), "in_chans": config.data.channels, "class_token": True}
    return fixed | {"global_pool": "token"} | {key: value for key, value in sizes.items() if value}


def commit_of(folder: Path) -> str:
    """Return the commit that the run noted; `unknown` where it noted none."""
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError, RecursionError):
        return str(json.loads((folder / "environment.json").read_text())["commit"])
    return "unknown"


def about(run: OpenedRun) -> dict[str, str]:
    """Return what every exported file carries, texts by name; what is no word or number is JSON."""
    vit, data = run.model.encoder, run.config.data
    return {
        "format": "pt",
        "method": method(run.config),
        "arch": run.config.model.arch,
        "timm_arguments": json.dumps(timm_arguments(run.config)),
        "image_size": json.dumps(list(data.image_size)),
        "patch_size": str(patch_size_of(vit)),
        "prefix_tokens": str(vit.num_prefix_tokens),
        "mean": json.dumps(list(data.mean)),
        "std": json.dumps(list(data.std)),
        "step": str(run.step),
        "averaged_weights": str(run.averaged).lower(),
        "ccmim_fast_commit": commit_of(run.folder),
        "settings": to_yaml(public(run.config)),
    }
