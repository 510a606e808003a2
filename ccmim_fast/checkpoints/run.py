"""Every command opens a run here: its settings, its weights, and how far it is."""

# N samples, G cells per side of a map

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ccmim_fast.build.model import build_model
from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.claims import check_claims, check_size
from ccmim_fast.checkpoints.manifest import CHECKPOINTS, MANIFEST
from ccmim_fast.config.load import from_yaml
from ccmim_fast.config.schema import Config
from ccmim_fast.config.validate import validate
from ccmim_fast.errors import CheckpointError, one_line
from ccmim_fast.models.ccmim import CCMIM

_PARTS = ("encoder", "decoder", "projector", "predictor")  # of the model, see `CCMIM`
_EMA = "module."  # torch's AveragedModel puts it before the names of the averaged weights


@dataclasses.dataclass(frozen=True)
class OpenedRun:
    """This record is what a command needs of a run's checkpoint."""

    path: Path  # folder of the checkpoint
    folder: Path  # folder of the run
    config: Config
    weights: dict[str, Tensor]  # state dict of the model, on the CPU
    averaged: bool = False  # the weights are their moving average (`optim.ema_decay`)
    step: int = 0  # finished optimizer steps
    epoch: float = 0  # epochs trained, rounded to hundredths; 0 for imported weights
    samples: int = 0  # images of an epoch
    images: str = ""  # fingerprint of the images, see `data.source.Source`
    maps_NGG: Tensor | None = None  # maps of the score bank [N, G, G] float16; None without a bank
    skipped: tuple[str, ...] = ()  # a line for each newer checkpoint that is damaged

    @cached_property
    def model(self) -> CCMIM:
        """Build the model in evaluation mode, float32 on the CPU, which divides as the run does at its epoch.

        Raises CheckpointError if the weights do not fit.
        """
        model = build_model(portable(self.config), self.epoch)
        try:
            model.load_state_dict(self.weights)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path}: the weights do not fit the settings: {one_line(error, 300)}") from None
        return model.eval()


def open_run(path: str | Path, weights: Literal["averaged", "trained"] = "averaged") -> OpenedRun:
    """Open the newest checkpoint of a run that loads, or the one checkpoint `path`; no code in a file is run.

    Args:
        weights: `averaged` takes the moving average where the run has one, `trained` the weights of the last step.

    Raises:
        CheckpointError: no checkpoint loads, or the checkpoint is not one of pretraining.
        ConfigError: the checkpoint has settings of another version.
    """
    return pretraining_in(newest_of(path), weights)


class Found(NamedTuple):
    """This tuple holds a checkpoint of a run that loads."""

    path: Path  # folder of the checkpoint
    folder: Path  # folder of the run
    state: dict[str, Any]
    problems: list[str]  # a line for each newer checkpoint that is damaged


def newest_of(path: str | Path) -> Found:
    """Load the newest checkpoint of a run that loads, or the one checkpoint `path`. Raises CheckpointError: none."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return Found(path, path.resolve().parent.parent, io.load(path), [])
    found = io.newest(path / CHECKPOINTS)
    if found.state is None:
        reason = "; ".join(found.problems) or "none at all"
        raise CheckpointError(f"{path}: no complete checkpoint in it; {reason}")
    return Found(found.path, path, found.state, found.problems)


def weights_in(state: dict[str, Any], weights: Literal["averaged", "trained"]) -> tuple[dict[str, Tensor], bool]:
    """Return the weights of a checkpoint's model, and whether they are their moving average, for `open_run`."""
    if state["ema"] is None or weights == "trained":
        return state["model"], False
    return {name.removeprefix(_EMA): value for name, value in state["ema"].items() if name.startswith(_EMA)}, True


def pretraining_in(found: Found, weights: Literal["averaged", "trained"] = "averaged") -> OpenedRun:
    """Return the run that a checkpoint is of; for the arguments and errors see `open_run`."""
    state = found.state
    try:
        text, progress = state["config"], state["progress"]
        step, seen, samples = (int(progress[key]) for key in ("step", "seen", "samples"))
        images, (tensors, averaged) = progress["images"], weights_in(state, weights)
        if not all(name.partition(".")[0] in _PARTS for name in tensors):
            raise KeyError("an evaluation has other parts")
        maps_NGG, config = state.get("maps"), from_yaml(text, str(found.path), check=_check_model)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError(f"{found.path}: not a checkpoint of pretraining; name the folder of such a run") from None
    path, folder, _, problems = found
    _check_own(config, tensors, str(path))
    epoch = round(seen / max(samples, 1), 2)
    epoch = int(epoch) if epoch == int(epoch) else epoch
    told = (averaged, step, epoch, samples, images, maps_NGG, tuple(problems))
    return OpenedRun(path, folder, config, tensors, *told)


def _check_model(config: Config) -> None:
    """Raise ConfigError for settings that no model has; those of its training may be refused by now."""
    validate(config, trains=False)


def _check_own(config: Config, tensors: dict[str, Tensor], place: str) -> None:
    """Raise CheckpointError where the settings are of a larger model than the weights: it would be built first."""
    check_claims(tensors, place)
    check_size(config.data.image_size, config.data.channels, tensors, place)
    encoder = ("encoder", "patch_embed.proj", config.model.depth, config.model.embed_dim)
    for part, first, depth, width in (encoder, ("decoder", "embed", config.decoder.depth, config.decoder.dim)):
        blocks = {name.split(".")[2] for name in tensors if name.startswith(f"{part}.blocks.")}
        wide = len(tensors.get(f"{part}.{first}.weight", ()))
        if depth not in (0, len(blocks)) or width not in (0, wide):
            found = f"{part}: {len(blocks)} blocks, {wide} wide"
            raise CheckpointError(f"{place}: the weights do not fit the settings: {found}")


def portable(config: Config) -> Config:
    """Return the settings with those that need the run's own device replaced by ones that work everywhere."""
    train = dataclasses.replace(config.train, device="auto", kernels="reference", attention="auto", recompute=False)
    return dataclasses.replace(config, train=train)
