"""An evaluation: a checkpoint measured by a published protocol, and what deviates from the protocol."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ccmim_fast.checkpoints.published import Weights
from ccmim_fast.config.evaluation import EvalConfig, validate_evaluation
from ccmim_fast.config.keys import flatten, nearest
from ccmim_fast.config.load import make_config
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.encoders import read_encoder
from ccmim_fast.evaluation.images import Images
from ccmim_fast.evaluation.job import Job
from ccmim_fast.evaluation.protocols import FOLDER, Protocol, deviations, protocol, write_result
from ccmim_fast.evaluation.registry import EVALUATIONS, load
from ccmim_fast.ranks.session import Session, main_first, open_session
from ccmim_fast.runs.folder import check_apart, describe_run, environment, evaluation_folder, open_run_folder
from ccmim_fast.runs.state import recorded


def evaluate(name: str, checkpoint: str, settings: Mapping[str, str]) -> str:
    """Measure a checkpoint; under torchrun on many processes. Writes result.json and result.md into the run's folder.

    Args:
        name: one of `EVALUATIONS`.
        checkpoint: the folder of a run or of one of its checkpoints, a .safetensors or .pth file, or timm:NAME.
        settings: keys of `EvalConfig`, and `config` (a preset or a file), each with the text of its value.

    Returns:
        The figures and the deviations from the protocol, to be printed.

    Raises:
        CcmimError: a user's error, with its exit code.
    """
    of, settings = protocol_of(name, settings)
    config = make_config(settings, EvalConfig, validate_evaluation, FOLDER)
    if config.data.source not in (sources := EVALUATIONS[name].sources):
        near = nearest(config.data.source, sources)
        raise ConfigError(f"data.source={config.data.source}: {name} has {', '.join(sources)}; nearest valid is {near}")
    if not config.run.dir:
        config = replace(config, run=replace(config.run, dir=evaluation_folder(checkpoint, name)))
    check_apart(config.run.dir, checkpoint)
    return _run(name, of, config, checkpoint)


def protocol_of(name: str, settings: Mapping[str, str]) -> tuple[Protocol, dict[str, str]]:
    """Return the protocol to compare with, and the settings with its preset among them.

    An evaluation by a file of settings is compared with the evaluation's first protocol.
    """
    asked = settings.get("config", name)
    is_file = os.sep in asked or asked.endswith((".yaml", ".yml"))
    return protocol(name, "" if is_file else asked), {"config": name, **settings}


def _run(name: str, of: Protocol, config: EvalConfig, checkpoint: str) -> str:
    with open_session(config.train.device, config.watch.timeout) as here:
        # In the order in which a mistake is cheapest to find: weights' header, images, folder.
        with main_first(here):  # that downloads weights and indexes images, if nobody has
            weights = read_encoder(checkpoint, config.model.arch, config.model.num_heads)
            train, test = load(EVALUATIONS[name].open_images)(config, weights.mean, weights.std)
        weights = weights._replace(mean=train.data.mean, std=train.data.std)
        folder = open_run_folder(config) if here.is_main else Path(config.run.dir)
        with recorded(folder, here.is_main, lambda: True):
            if here.is_main:
                describe_run(folder, config, here.device)
            torch.manual_seed(config.seed)  # of new heads
            figures = load(EVALUATIONS[name].run)(Job(config, here, folder, weights, train, test))
            if not here.is_main:
                return ""
            return write_result(folder, _result(name, of, config, weights, train, test, figures, here), of)


def _result(
    name: str,
    of: Protocol,
    config: EvalConfig,
    weights: Weights,
    train: Images,
    test: Images,
    figures: dict[str, float],
    here: Session,
) -> dict[str, Any]:
    return {
        "evaluation": name,
        "checkpoint": weights.name,
        "step": weights.step,
        "arch": weights.arch,
        "figures": figures,
        "chance": 1 / test.classes if EVALUATIONS[name].guessed else None,
        "protocol": of.name,
        "source": of.source,
        "deviations": deviations(of, config, weights, train, test),
        "images": f"{train.words()} to train on, {test.words()} to test on",
        "ranks": here.world_size,
        "config": flatten(config),
        "environment": environment(here.device),
    }
