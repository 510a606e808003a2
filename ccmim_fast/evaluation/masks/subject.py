"""The subject of `ccmim eval masks` is a model, of a run or of published weights, with settings to measure it by."""

import dataclasses
from typing import NamedTuple

import torch

from ccmim_fast.build.model import build_model, build_score_source
from ccmim_fast.checkpoints.fitted import derived, fill_
from ccmim_fast.checkpoints.published import is_run, read_weights, with_arch
from ccmim_fast.checkpoints.run import OpenedRun, open_run, portable
from ccmim_fast.config.keys import show
from ccmim_fast.config.load import difference, load_config
from ccmim_fast.config.schema import Config, ModelConfig, RunConfig
from ccmim_fast.errors import ConfigError
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.report.snapshots import own_images
from ccmim_fast.runs.folder import evaluation_folder

PROG = "ccmim eval masks"
# Settings that change something here; and the sizes of weights that do not tell them.
COUNT = ("data.", "mask.", "score.", "seed", "run.dir", "run.overwrite", "train.device")
_SIZES = ("model.", "decoder.")


class Subject(NamedTuple):
    """This tuple holds a model in evaluation mode on the CPU, and what is known of it."""

    name: str  # the checkpoint, for people
    model: CCMIM
    config: Config  # the run's, with what the user changed
    decodes: bool  # its decoder is trained
    step: int | None = None  # trained so far; None where nobody knows
    epoch: float | None = None
    run: OpenedRun | None = None  # what it was opened from; None for weights that are no run's

    def untrained(self) -> "Subject":
        """Return the model before its first step: the weights that the run's seed draws."""
        return Subject(self.name, initial_model(self.config), self.config, self.decodes, step=0, epoch=0)


def read_subject(place: str, settings: list[str], images: str = "") -> Subject:
    """Read the model at a place, see `read_weights`; no code in a file is run.

    The user's options `settings` and folder `images` take the place of the run's own. Raises CheckpointError: missing,
    damaged, or of another model; ConfigError: a setting that is wrong or changes nothing here, an architecture that
    must be told, or attention that cannot be read.
    """
    if is_run(place):
        run = open_run(place)
        run = dataclasses.replace(run, config=_settled(run.config, place, settings, images))
        subject = Subject(str(run.path), run.model, run.config, True, run.step, run.epoch, run)
    else:
        subject = _published(place, settings, images)
    build_score_source(subject.config, subject.model.encoder)
    return subject


def _published(place: str, settings: list[str], images: str) -> Subject:
    found = read_weights(place)
    named = any(option.startswith("--model.arch") for option in settings)
    if found.tensors and (named or not found.arch):
        model = load_config(settings, PROG).model
        told = named or model.arch != ModelConfig.arch  # by a file of settings
        found = with_arch(found, model.arch if told else "", model.num_heads)
    # A bank holds scores of the images of a run.
    base = load_config([*derived(found, settings), "--score.source=all"], PROG)
    config = _settled(base, place, settings, images)
    model = initial_model(config)
    decodes = bool(found.tensors) and "decoder" not in fill_(model, found)
    return Subject(place, model, config, decodes)


def initial_model(config: Config) -> CCMIM:
    """Return the model with the weights that its seed draws, in evaluation mode."""
    torch.manual_seed(config.seed)
    return build_model(config).eval()


def _settled(base: Config, place: str, settings: list[str], images: str) -> Config:
    base = dataclasses.replace(portable(base), run=RunConfig(dir=evaluation_folder(place, "masks")))
    if images:
        data = dataclasses.replace(base.data, source="images", root=images, index="")
        base = dataclasses.replace(base, data=data)
    config = load_config(settings, PROG, base=base)
    named = images or any(option.startswith("--data.root") for option in settings)
    if not named and config.data.root == base.data.root:
        config = dataclasses.replace(config, data=own_images(config.data))
    free = COUNT if is_run(place) else (*COUNT, *_SIZES)
    for key, _, value in difference(base, config):
        if not key.startswith(free):
            raise ConfigError(f"--{key}={show(value)}: changes nothing here; what does: {', '.join(free)}")
    return config
