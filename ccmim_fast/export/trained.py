"""A run as its exports need it: the model with its weights, its settings, and what is to be told of it."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from ccmim_fast.build.model import build_model
from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.manifest import MANIFEST
from ccmim_fast.config.load import difference, from_yaml, to_yaml
from ccmim_fast.config.schema import Config, RunConfig
from ccmim_fast.errors import CheckpointError
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.tokens import patch_size_of

_PLACES = ("root", "index")  # settings of `data` that name places of the machine, which are nobody else's business


class Trained(NamedTuple):
    """A checkpoint of a run.

    Attributes:
        model: in evaluation mode, float32 on the CPU.
        config: of the run, without the places of its machine.
        step: finished optimizer steps.
        samples: images of an epoch.
        averaged: the weights are their moving average (`optim.ema_decay`).
        run: the run's folder.
    """

    model: CCMIM
    config: Config
    step: int
    samples: int
    averaged: bool
    run: Path

    @property
    def method(self) -> str:
        return "MAE" if self.config.contrast.loss == "none" and self.config.mask.strategy == "random" else "ccMIM"

    def timm_arguments(self) -> dict[str, Any]:
        """What `timm.create_model` needs beside the architecture's name to build the encoder."""
        model, data = self.config.model, self.config.data
        sizes = {key: getattr(model, key) for key in ("patch_size", "embed_dim", "depth", "num_heads")}
        fixed = {"img_size": list(data.image_size), "in_chans": data.channels, "class_token": True}
        return fixed | {"global_pool": "token"} | {key: value for key, value in sizes.items() if value}

    def about(self) -> dict[str, str]:
        """What every exported file carries, texts by name; what is no word or number is JSON."""
        vit, data = self.model.encoder, self.config.data
        return {
            "format": "pt",
            "method": self.method,
            "arch": self.config.model.arch,
            "timm_arguments": json.dumps(self.timm_arguments()),
            "image_size": json.dumps(list(data.image_size)),
            "patch_size": str(patch_size_of(vit)),
            "prefix_tokens": str(vit.num_prefix_tokens),
            "mean": json.dumps(list(data.mean)),
            "std": json.dumps(list(data.std)),
            "step": str(self.step),
            "averaged_weights": str(self.averaged).lower(),
            "ccmim_fast_commit": self.environment().get("commit", "unknown"),
            "settings": to_yaml(self.config),
        }

    def changed(self) -> list[tuple[str, Any]]:
        """The settings that are not the schema's defaults."""
        return [(key, value) for key, _, value in difference(Config(), self.config)]

    def environment(self) -> dict[str, Any]:
        """What the run noted of its machine; nothing where it did not."""
        try:
            found = json.loads((self.run / "environment.json").read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


def read_trained(place: str) -> Trained:
    """The newest checkpoint of the run in the folder `place`, or the checkpoint that `place` is itself.

    Weights that ranks have divided are put together; moving averages are taken where the run has them.

    Raises:
        CheckpointError: there is none that loads, or it is no run's.
        ConfigError: it is of a version with other settings.
    """
    path = Path(place)
    if (path / MANIFEST).is_file():
        state, run = io.load(path), path.resolve().parent.parent
    else:
        path, state, problems = io.newest(path / "checkpoints")
        run = Path(place)
        if state is None:
            raise CheckpointError(f"{place}: no complete checkpoint in it; {'; '.join(problems) or 'none at all'}")
    try:
        text, weights, averages = state["config"], state["model"], state["ema"]
        step, samples = (int(state["progress"][key]) for key in ("step", "samples"))
        if averages is not None:
            weights = {k.removeprefix("module."): v for k, v in averages.items() if k.startswith("module.")}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError(f"{path}: {io.STATE} is no run's: it has no model, settings or progress") from None
    config = from_yaml(text, str(path))
    model = build_model(config)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not of its own settings: {' '.join(str(error).split())[:300]}") from None
    public = dataclasses.replace(
        config, run=RunConfig(), data=dataclasses.replace(config.data, **dict.fromkeys(_PLACES, ""))
    )
    return Trained(model.eval(), public, step, samples, averages is not None, run)
