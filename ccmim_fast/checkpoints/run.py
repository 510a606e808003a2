"""Every command opens a run here: its settings, its weights, and how far it is."""

# N samples, G cells per side of a map

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Literal

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
        """Build the model in evaluation mode, float32 on the CPU; raises CheckpointError if the weights do not fit."""
        model = build_model(portable(self.config))
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
    path = Path(path)
    if (path / MANIFEST).is_file():
        found, folder = io.Newest(path, io.load(path), []), path.resolve().parent.parent
    else:
        found, folder = io.newest(path / CHECKPOINTS), path
    if found.state is None:
        reason = "; ".join(found.problems) or "none at all"
        raise CheckpointError(f"{path}: no complete checkpoint in it; {reason}")
    state = found.state
    try:
        text, tensors, averages, progress = state["config"], state["model"], state["ema"], state["progress"]
        step, seen, samples = (int(progress[key]) for key in ("step", "seen", "samples"))
        images, averaged = progress["images"], averages is not None and weights == "averaged"
        if averaged:
            tensors = {name.removeprefix(_EMA): value for name, value in averages.items() if name.startswith(_EMA)}
        if not all(name.partition(".")[0] in _PARTS for name in tensors):
            raise KeyError("an evaluation has other parts")
        maps_NGG, config = state.get("maps"), from_yaml(text, str(found.path), check=_check_model)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError(f"{found.path}: not a checkpoint of pretraining; name the folder of such a run") from None
    _check_own(config, tensors, str(found.path))
    epoch = round(seen / max(samples, 1), 2)
    epoch = int(epoch) if epoch == int(epoch) else epoch
    return OpenedRun(
        found.path, folder, config, tensors, averaged, step, epoch, samples, images, maps_NGG, tuple(found.problems)
    )


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
