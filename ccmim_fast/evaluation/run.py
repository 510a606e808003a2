"""An evaluation: a checkpoint measured by a published protocol, and what deviates from the protocol."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ccmim_fast.config.evaluation import EvalConfig, images_of, validate_evaluation
from ccmim_fast.config.keys import flatten, nearest
from ccmim_fast.config.load import make_config
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.encoders import read_encoder
from ccmim_fast.evaluation.job import Images, Job
from ccmim_fast.evaluation.protocols import FOLDER, Protocol, deviations, protocol, write_result
from ccmim_fast.evaluation.registry import EVALUATIONS, PACKAGE, check_installed
from ccmim_fast.ranks.session import main_first, open_session
from ccmim_fast.registry import load
from ccmim_fast.runs.folder import check_apart, describe_run, environment, evaluation_folder, open_run_folder
from ccmim_fast.runs.state import recorded


def evaluate(name: str, checkpoint: str, settings: Mapping[str, str]) -> str:
    """Measure a checkpoint; under torchrun on many processes. Writes result.json and result.md into the run's folder.

    `name` is one of `EVALUATIONS`; for `checkpoint` see `read_weights`; `settings` are keys of `EvalConfig`, and
    `config` (a preset or a file), each with the text of its value. Returns the figures and the deviations from the
    protocol, to be printed. Raises CcmimError: a user's error.
    """
    of, settings = protocol_of(name, settings)
    config = make_config(settings, EvalConfig, validate_evaluation, FOLDER)
    row, source, optimizer = EVALUATIONS[name], config.data.source, config.optim.name
    for key, given, valid in (("data.source", source, row.sources), ("optim.name", optimizer, row.optimizers)):
        if given not in valid:
            near = nearest(given, valid)
            raise ConfigError(f"{key}={given}: {name} has {', '.join(valid)}; nearest valid is {near}")
    if not config.run.dir:
        config = replace(config, run=replace(config.run, dir=evaluation_folder(checkpoint, name)))
    check_apart(config.run.dir, checkpoint)
    with open_session(config.train.device, config.watch.timeout) as here:
        # In the order in which a mistake is cheapest to find: weights' header, libraries, images, folder.
        with main_first(here):  # that downloads weights and indexes images, if nobody has
            model = config.model
            weights = read_encoder(checkpoint, model.arch, model.num_heads, model.pretrained_size)
            mean, std = config.data.mean or weights.mean, config.data.std or weights.std
            check_installed(f"eval {name}", row.needs, name)
            data = [images_of(config.data, mean, std, test) for test in (False, True)]
            train, test = map(Images, load(f"{PACKAGE}.{row.open_images}")(config, *data), data)
        folder = open_run_folder(config) if here.is_main else Path(config.run.dir)
        job = Job(config, here, folder, weights._replace(mean=mean, std=std), train, test)
        with recorded(folder, here.is_main, lambda: True):
            if here.is_main:
                describe_run(folder, config, here.device)
            torch.manual_seed(config.seed)  # of new heads
            figures = load(f"{PACKAGE}.{row.run}")(job)
            return write_result(folder, _result(name, of, job, figures), of) if here.is_main else ""


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
