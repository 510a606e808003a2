"""`ccmim eval NAME CHECKPOINT [settings]`: any checkpoint by a published protocol, and what deviates from it."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ccmim_fast.checkpoints.published import Weights
from ccmim_fast.config.evaluation import EvalConfig, validate_evaluation
from ccmim_fast.config.keys import flatten, nearest, show
from ccmim_fast.config.load import load_config
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.encoders import read_encoder
from ccmim_fast.evaluation.images import Images
from ccmim_fast.evaluation.job import Job
from ccmim_fast.evaluation.protocols import FOLDER, Protocol, deviations, protocol, write_result
from ccmim_fast.evaluation.registry import EVALUATIONS, load
from ccmim_fast.ranks.session import Session, main_first, open_session
from ccmim_fast.runs.folder import check_apart, describe_run, environment, evaluation_folder, open_run_folder
from ccmim_fast.runs.state import recorded

_NAMES = (*EVALUATIONS, "masks")  # that is a command of its own: it draws, and needs neither labels nor a protocol
USAGE = f"""usage: ccmim eval {"|".join(EVALUATIONS)} CHECKPOINT [--config PRESET_OR_FILE] [--section.key=value ...]
       ccmim eval masks CHECKPOINT [IMAGES] [options] [--section.key=value ...]

CHECKPOINT is the folder of a run or of one of its checkpoints, a .safetensors or .pth file, or timm:NAME.
ccmim eval NAME --help lists the settings."""


def evaluate(argv: list[str]) -> None:
    """`ccmim eval NAME CHECKPOINT [--config PRESET_OR_FILE] [settings]`; under torchrun on many processes.

    Raises:
        CcmimError: a user's error, with its exit code.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if not argv or argv[0] not in EVALUATIONS:
        asked = f"{show(argv[0])}: no such evaluation; nearest: {nearest(argv[0], _NAMES)}" if argv else "which one"
        raise ConfigError(f"ccmim eval: {asked}; one of {', '.join(_NAMES)}")
    name, prog = argv[0], f"ccmim eval {argv[0]} CHECKPOINT"
    rest = argv[1:]
    helping = bool({"-h", "--help"} & set(rest))
    checkpoint = "" if helping or not rest or rest[0].startswith("--") else rest.pop(0)
    of, rest = _protocol_of(name, rest)
    config = load_config(rest, prog, EvalConfig, validate_evaluation, FOLDER)
    if not checkpoint:
        raise ConfigError(f"{prog}: the checkpoint is missing; a run's folder, a file, or timm:NAME")
    if config.data.source not in (sources := EVALUATIONS[name].sources):
        near = nearest(config.data.source, sources)
        raise ConfigError(f"data.source={config.data.source}: {name} has {', '.join(sources)}; nearest valid is {near}")
    if not config.run.dir:
        config = replace(config, run=replace(config.run, dir=evaluation_folder(checkpoint, name)))
    check_apart(config.run.dir, checkpoint)
    _run(name, of, config, checkpoint)


def _protocol_of(name: str, argv: list[str]) -> tuple[Protocol, list[str]]:
    """The protocol to compare with, and the settings with its preset among them. A file is compared with the first."""
    for at, word in enumerate(argv):
        if word == "--config" or word.startswith("--config="):
            asked = word.partition("=")[2] or (argv[at + 1] if at + 1 < len(argv) else "")
            is_file = os.sep in asked or asked.endswith((".yaml", ".yml"))
            return protocol(name, "" if is_file else asked), argv
    return protocol(name), ["--config", name, *argv]


def _run(name: str, of: Protocol, config: EvalConfig, checkpoint: str) -> None:
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
            if here.is_main:
                print(write_result(folder, _result(name, of, config, weights, train, test, figures, here), of))


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
