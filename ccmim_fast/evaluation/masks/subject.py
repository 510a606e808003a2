"""The model to look at, of a run's checkpoint or of published weights, and the settings it is looked at by."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ccmim_fast.build.model import build_model, build_score_source
from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.manifest import MANIFEST
from ccmim_fast.checkpoints.published import TIMM, assumed_arch, derived, fill_, known_arch, read_published
from ccmim_fast.config.keys import show
from ccmim_fast.config.load import difference, from_yaml, load_config
from ccmim_fast.config.schema import Config, ModelConfig, RunConfig
from ccmim_fast.errors import CheckpointError, ConfigError
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.scores import PriorScores
from ccmim_fast.report.snapshots import FewImages, anywhere, epoch_of, known_of, restored, spread
from ccmim_fast.runs.folder import CHECKPOINTS, evaluation_folder

PROG = "ccmim eval masks"
# Settings that change something here; and the sizes of weights that do not tell them.
COUNT = ("data.", "mask.", "score.", "seed", "run.dir", "run.overwrite", "train.device")
_SIZES = ("model.", "decoder.")
_NO_BANK = "--score.source=all"  # of weights without a run


class Subject(NamedTuple):
    """A model in evaluation mode on the CPU, and what is known of it.

    Attributes:
        name: the checkpoint, for people.
        config: the run's, with what the user changed.
        decodes: its decoder is trained.
        step, epoch: trained so far; None where nobody knows.
        state: `maps` and `progress` of a run's checkpoint, for its score bank; None of other weights.
    """

    name: str
    model: CCMIM
    config: Config
    decodes: bool
    step: int | None = None
    epoch: float | None = None
    state: dict[str, Any] | None = None

    def known(self, few: FewImages) -> PriorScores | None:
        """What the run's score bank says of the images, if it does."""
        return None if self.state is None else known_of(self.model, self.state, few)


def places(checkpoint: str, moments: int) -> list[str]:
    """What to read: `checkpoint` itself, or for several moments as many checkpoints of the run in it, oldest first.

    Raises:
        ConfigError: several moments of what is no run's folder.
    """
    if moments < 2:
        return [checkpoint]
    found = io.checkpoints(Path(checkpoint) / CHECKPOINTS)
    if not found:
        raise ConfigError(f"--moments={moments}: needs the folder of a run with checkpoints, got {show(checkpoint)}")
    return [str(path) for path in spread(found, moments)]


def read_subject(place: str, settings: list[str], images: str = "") -> Subject:
    """The model at a place, no code in it being run.

    Args:
        place: folder of a run or of one of its checkpoints; what `read_published` reads; `timm:ARCH` for initial
            weights.
        settings: options of the user's, in place of the run's own.
        images: a folder in place of the run's own images.

    Raises:
        CheckpointError: missing, damaged, or of another model.
        ConfigError: a setting that is wrong or changes nothing here, an architecture that must be told, or attention
            that cannot be read.
    """
    path = Path(place)
    if place.startswith(TIMM) and "." not in place:
        base = load_config([f"--model.arch={known_arch(place.removeprefix(TIMM))}", _NO_BANK], PROG)
        subject = _initial(place, _settled(base, place, settings, images))
    elif path.is_dir():
        subject = _of_run(path, settings, images)
    else:
        subject = _of_file(place, settings, images)
    build_score_source(subject.config, subject.model.encoder)
    return subject


def _initial(name: str, config: Config) -> Subject:
    torch.manual_seed(config.seed)
    return Subject(name, build_model(config).eval(), config, decodes=False)


def _of_file(place: str, settings: list[str], images: str) -> Subject:
    found = read_published(place)
    named = any(option.startswith("--model.arch") for option in settings)
    if named or not found.arch:
        model = load_config(settings, PROG).model
        told = named or model.arch != ModelConfig.arch  # by a file of settings
        arch = known_arch(model.arch) if told else assumed_arch(found, place, model.num_heads)
        found = found._replace(arch=arch)
    base = load_config([*derived(found, settings), _NO_BANK], PROG)
    subject = _initial(place, _settled(base, place, settings, images))
    return subject._replace(decodes="decoder" not in fill_(subject.model, found.tensors, place))


def _of_run(path: Path, settings: list[str], images: str) -> Subject:
    if (path / MANIFEST).is_file():
        state = io.load(path)
    else:
        found, state, problems = io.newest(path / CHECKPOINTS)
        if state is None:
            raise CheckpointError(f"{path}: no complete checkpoint in it; {'; '.join(problems) or 'none at all'}")
        path = found
    try:
        base = from_yaml(state["config"], str(path))
        config = _settled(base, str(path), settings, images)
        model, step, epoch = restored(state, config), state["progress"]["step"], epoch_of(state)
        kept = {"progress": state["progress"], "maps": state.get("maps")}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: it is no checkpoint of pretraining") from None
    return Subject(str(path), model, config, True, step, epoch, kept)


def untrained(subject: Subject) -> Subject:
    """The same before its first step: the weights that the run's seed draws."""
    return _initial(subject.name, subject.config)._replace(decodes=subject.decodes, step=0, epoch=0)


def _settled(base: Config, place: str, settings: list[str], images: str) -> Config:
    base = dataclasses.replace(anywhere(base), run=RunConfig(dir=evaluation_folder(place, "masks")))
    if images:
        data = dataclasses.replace(base.data, source="images", root=images, index="")
        base = dataclasses.replace(base, data=data)
    config = load_config(settings, PROG, base=base)
    free = COUNT if Path(place).is_dir() else (*COUNT, *_SIZES)
    for key, _, value in difference(base, config):
        if not key.startswith(free):
            raise ConfigError(f"--{key}={show(value)}: changes nothing here; what does: {', '.join(free)}")
    return config
