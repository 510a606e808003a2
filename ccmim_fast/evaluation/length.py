"""The length of a run and of its warm-up, which settings count in steps or in epochs."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ccmim_fast.config.evaluation import EvalConfig

UNITS = {"train.steps": "train.epochs", "optim.warmup_steps": "optim.warmup_epochs"}  # 0 steps: epochs count
OTHER_UNIT = UNITS | {epochs: steps for steps, epochs in UNITS.items()}


def in_units_asked(config: EvalConfig, asked: Mapping[str, str]) -> EvalConfig:
    """Return the settings with epochs where `asked`, the settings that the user names, has them and no steps."""
    for steps, epochs in UNITS.items():
        if epochs in asked and steps not in asked:
            section, _, name = steps.partition(".")
            config = replace(config, **{section: replace(getattr(config, section), **{name: 0})})
    return config


def with_warm_up(config: EvalConfig, of: EvalConfig, images: int, images_of: int) -> EvalConfig:
    """Return the settings; a warm-up that the run does not hold becomes the protocol's share of the run.

    `of` are the protocol's own settings; `images` are those of an epoch of the run, `images_of` of the protocol's.
    """
    (whole, full), (run, warm_up) = _in_steps(of, images_of), _in_steps(config, images)
    if warm_up <= run:
        return config
    share, steps = full / whole, config.train.steps
    fitted = (max(1, int(share * steps)), 0.0) if steps else (0, share * config.train.epochs)
    return replace(config, optim=replace(config.optim, warmup_steps=fitted[0], warmup_epochs=fitted[1]))


def _in_steps(config: EvalConfig, images: int) -> tuple[float, float]:
    """Return the steps of a run and of its warm-up, with so many images an epoch."""
    train, optim = config.train, config.optim
    an_epoch = images / train.batch_size
    return train.steps or train.epochs * an_epoch, optim.warmup_steps or optim.warmup_epochs * an_epoch


def in_force(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings, by their keys, without those of the unit that does not count."""
    idle = {epochs if figures[steps] else steps for steps, epochs in UNITS.items()}
    return {key: value for key, value in figures.items() if key not in idle}
