"""An evaluation: a checkpoint measured by a published protocol, and what deviates from the protocol."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ccmim_fast.config.evaluation import EvalConfig, images_of, protocol_crop, validate_evaluation
from ccmim_fast.config.keys import flatten, nearest
from ccmim_fast.config.load import make_config
from ccmim_fast.data.index.left_out import left_out_lines
from ccmim_fast.data.source import usable_count
from ccmim_fast.errors import ConfigError, say
from ccmim_fast.evaluation.encoders import read_encoder
from ccmim_fast.evaluation.images import Images
from ccmim_fast.evaluation.job import Job, Work
from ccmim_fast.evaluation.length import in_units_asked, with_warm_up
from ccmim_fast.evaluation.protocols import FOLDER, Protocol, deviations, protocol, write_result
from ccmim_fast.evaluation.registry import EVALUATIONS, PACKAGE, check_installed
from ccmim_fast.ranks.session import Session, main_first, open_session
from ccmim_fast.registry import load
from ccmim_fast.runs.folder import RunFolder, environment, evaluation_folder, read_by, run_folder


def evaluate(name: str, checkpoint: str, settings: Mapping[str, str]) -> str:
    """Measure a checkpoint; under torchrun on many processes. Writes result.json and result.md into the run's folder.

    `name` is one of `EVALUATIONS`; for `checkpoint` see `read_weights`; `settings` are keys of `EvalConfig`, and
    `config` (a preset or a file), each with the text of its value. Returns the figures and the deviations from the
    protocol, to be printed. Raises CcmimError: a user's error.
    """
    of, settings = protocol_of(name, settings)
    config = in_units_asked(make_config(settings, EvalConfig, validate_evaluation, FOLDER), settings)
    named = settings["config"] != of.name or settings.keys() & {"optim.warmup_epochs", "optim.warmup_steps"}
    row, source, optimizer = EVALUATIONS[name], config.data.source, config.optim.name
    for key, given, valid in (("data.source", source, row.sources), ("optim.name", optimizer, row.optimizers)):
        if given not in valid:
            near = nearest(given, valid)
            raise ConfigError(f"{key}={given}: {name} has {', '.join(valid)}; nearest valid is {near}")
    if not config.data.test_crop:
        config = replace(config, data=replace(config.data, test_crop=protocol_crop(config.data.image_size)))
    if not config.run.dir:
        config = replace(config, run=replace(config.run, dir=evaluation_folder(checkpoint, name)))
    reads = {"checkpoint": checkpoint, **read_by(config.data)}
    with (
        open_session(config.train.device, config.watch.timeout) as here,
        run_folder(config.run, reads, is_main=here.is_main) as folder,
    ):
        job, work = _prepared(name, checkpoint, config, here, folder, None if named else of)
        known = _tell_left_out(job)
        figures = work()
        folder.begin(job.config, here.device)  # of an evaluation without training, here only
        result = _result(name, of, job, figures) | {"left_out": _tell_left_out(job, known)}
        return write_result(folder.path, result, of) if here.is_main else ""


def _tell_left_out(job: Job, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what is left out of both sets by the reason, see `Images.left_out`; print what is not `known` yet."""
    found = {"train": job.train.left_out(), "test": job.test.left_out()}
    if known is None and job.here.is_main:
        sources = {images.source.fingerprint: images.source for images in (job.train, job.test)}
        for source in sources.values():
            for line in left_out_lines(source, samples=False):
                say(line)
    for part, by_reason in found.items() if job.here.is_main else ():
        for why, said in by_reason.items():
            if known is None or known[part].get(why) != said:
                of = f"{said['images']} of {said['of']} images to {part} on"
                say(f"left out: {of} {why}, the first {said['first']!r}")
    return found


def _prepared(
    name: str, checkpoint: str, config: EvalConfig, here: Session, folder: RunFolder, warms_up_as: Protocol | None
) -> tuple[Job, Work]:
    """Return the job and its work, with the warm-up of the protocol `warms_up_as` unless the user names one.

    Whatever can be refused is, in the order in which a mistake is cheapest to find: libraries, weights, images and
    their labels, what does not fit together, images to test on that cannot be read.
    """
    row = EVALUATIONS[name]
    check_installed(f"eval {name}", row.needs, name)
    with main_first(here):  # that downloads weights and indexes images, if nobody has
        told = config.model
        weights = read_encoder(checkpoint, told.arch, told.num_heads, told.pretrained_size)
        if weights.layout and here.is_main:
            say(f"{checkpoint}: {weights.layout}")
        mean, std = config.data.mean or weights.mean, config.data.std or weights.std
        shown = replace(config.data, max_value=config.data.max_value or weights.max_value)
        data = [images_of(shown, mean, std, test) for test in (False, True)]
        train, test = map(Images, load(f"{PACKAGE}.{row.open_images}")(config, *data), data)
    if warms_up_as is not None:
        images = usable_count(train.source)
        published = warms_up_as.images[0] if warms_up_as.images else images
        config = with_warm_up(config, warms_up_as.config, images, published)
    job = Job(config, here, folder, weights._replace(mean=mean, std=std), train, test)
    torch.manual_seed(config.seed)  # of new heads
    work = load(f"{PACKAGE}.{row.prepare}")(job)
    if row.trains and config.data.source != "shapes":
        test.look_through_(here)
    return job, work


def protocol_of(name: str, settings: Mapping[str, str]) -> tuple[Protocol, dict[str, str]]:
    """Return the protocol to compare with (of a file of settings: the first), and the settings with its preset."""
    asked = settings.get("config", name)
    is_file = os.sep in asked or asked.endswith((".yaml", ".yml"))
    return protocol(name, "" if is_file else asked), {"config": name, **settings}


def _result(name: str, of: Protocol, job: Job, figures: dict[str, float]) -> dict[str, Any]:
    return {
        "evaluation": name,
        "checkpoint": job.weights.name,
        "step": job.weights.step,
        "arch": job.weights.arch,
        "figures": figures,
        "chance": 1 / job.test.classes if EVALUATIONS[name].guessed else None,
        "protocol": of.name,
        "source": of.source,
        "deviations": deviations(of, job),
        "images": f"{job.train.words()} to train on, {job.test.words()} to test on",
        "ranks": job.here.world_size,
        "config": flatten(job.config),
        "environment": environment(job.here.device),
    }
