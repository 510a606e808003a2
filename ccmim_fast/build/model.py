"""This file builds the model and its losses from the configuration, which `models/` and `losses/` do not know.

A class behind a registered name is built with the settings of its section that its constructor names as keyword
arguments: a new score source or loss with a new setting needs no line here.
"""

import inspect
from typing import Any

from torch import nn

from ccmim_fast import registry
from ccmim_fast.config.schema import Config
from ccmim_fast.config.validate import check_hints, over_epochs
from ccmim_fast.errors import ConfigError
from ccmim_fast.losses.criteria import Objective
from ccmim_fast.models.ccmim import CCMIM, Decoder
from ccmim_fast.models.encoder import build_encoder, configure_blocks, initialise
from ccmim_fast.models.heads import Heads, build_predictor, build_projector
from ccmim_fast.models.scores import ScoreSource
from ccmim_fast.models.tokens import grid_of, patch_size_of
from ccmim_kernels.sample_partition import scheduled


def build_model(config: Config, epoch: float | None = None) -> CCMIM:
    """Build the model of a run, its initial weights from torch's global generator; ConfigError: sizes do not fit.

    With an `epoch` the model divides as the run does at that epoch, whatever epoch it is called with.
    """
    data, kernels = config.data, config.train.kernels
    encoder = build_encoder(image_size=tuple(data.image_size), channels=data.channels, **vars(config.model))
    grid = grid_of(encoder)
    sampling, outputs = _sampling(config, grid, epoch), _reconstruction(config, patch_size_of(encoder)).width
    decoder = Decoder(
        encoder_dim=encoder.embed_dim, grid=grid, outputs=outputs, kernels=kernels, **vars(config.decoder)
    )
    configure_blocks(
        [*encoder.blocks, *decoder.blocks],
        attention=config.train.attention,
        kernels=kernels,
        recompute=config.train.recompute,
    )
    return CCMIM(
        encoder,
        decoder,
        mean=data.mean,
        std=data.std,
        sampling=sampling,
        score_source=build_score_source(config, encoder) if config.mask.strategy.startswith("importance") else None,
        heads=_heads(config, encoder.embed_dim),
        kernels=kernels,
    )


def build_objective(config: Config, model: CCMIM) -> Objective:
    """Build the losses of a run, on the model's device."""
    contrast = registry.CONTRASTS[config.contrast.loss]
    criterion = _configured(contrast.path, config, config.contrast) if contrast.path else None
    objective = Objective(_reconstruction(config, model.patch), criterion, config.contrast.weight)
    return objective.to(model.mean_C.device)


def build_score_source(config: Config, encoder: nn.Module) -> ScoreSource:
    """Build `score.source` for this encoder; raises ConfigError where the encoder's attention cannot be read so."""
    return _configured(registry.SCORE_SOURCES[config.score.source].path, config, config.score, encoder)


def _sampling(config: Config, grid: tuple[int, int], epoch: float | None) -> dict[str, Any]:
    """Return the arguments of `sample_partition`; the number visible is int(L * (1 - ratio)), as in MAE."""
    patches, mask = grid[0] * grid[1], config.mask
    keep = int(patches * (1 - mask.ratio))
    if not 1 <= keep < patches:
        nearest = min(max(keep, 1), patches - 1)
        raise ConfigError(
            f"mask.ratio={mask.ratio} leaves {keep} of {patches} patches visible; "
            f"nearest valid: {1 - nearest / patches:.4g}"
        )
    check_hints(config, patches)
    masked, has_teacher = patches - keep, bool(registry.CONTRASTS[config.contrast.loss].path)
    temperature, span = over_epochs(config.score.temperature), max(1, config.train.epochs - 1)
    important = tuple(round(masked * share) for share in over_epochs(mask.importance))
    hints = tuple(round(mask.hints * count) for count in important)
    if epoch is not None:
        done = min(int(epoch), span)
        temperature = temperature[0] + (temperature[1] - temperature[0]) * done / span
        important, hints = (scheduled(*counts, done, span) for counts in (important, hints))
    return {
        "grid": grid,
        "keep": keep,
        "seed": config.seed,
        "strategy": mask.strategy,
        "noise": mask.noise,
        "temperature": temperature,
        "block_min": mask.block_min,
        "teacher": max(1, round(masked * config.teacher.tokens)) if has_teacher else masked,
        "important": important,
        "hints": hints,
        "epochs": config.train.epochs,
    }


def _reconstruction(config: Config, patch: int) -> nn.Module:
    path = registry.TARGETS[config.target.kind].path
    return _configured(path, config, config.target, patch, config.data.mean, config.data.std)


def _heads(config: Config, width: int) -> Heads | None:
    contrast, heads = registry.CONTRASTS[config.contrast.loss], config.heads
    if not contrast.path:
        return None
    projector = build_projector(width, heads.dim, sync_bn=heads.sync_bn)
    predictor = build_predictor(heads.dim, sync_bn=heads.sync_bn) if contrast.predictor else None
    if heads.init == "xavier":
        for part in filter(None, (projector, predictor)):
            initialise(part)
    return Heads(projector, predictor, contrast.negatives)


def _configured(path: str, config: Config, section: Any, *arguments: Any) -> Any:
    """Build the class at `path`; its keyword arguments are settings of `section`, or `kernels`."""
    made = registry.load(path)
    options = {**vars(section), "kernels": config.train.kernels}
    return made(*arguments, **{name: options[name] for name in inspect.signature(made).parameters if name in options})
