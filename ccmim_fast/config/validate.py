"""Refuses a configuration that cannot run, with one line that names the key, its value and the nearest valid one.

The range of one setting stands with the setting; here are the rules between settings.
"""

import math
import os
import re
from typing import Any

from ccmim_fast.config.keys import flatten, nearest, settings
from ccmim_fast.config.schema import Config, RunConfig
from ccmim_fast.config.units import Scheduled
from ccmim_fast.config.values import check_values, refuse
from ccmim_fast.registry import CONTRASTS, SCORE_SOURCES

VIT_MODULES = ("vision_transformer", "deit", "eva")  # of timm's, with the names of encoders
STEM_MODULES = ("vision_transformer_hybrid", "vitamin")  # ViTs behind a convolutional network, refused by the encoder


def validate(config: Config, world_size: int = 1, trains: bool = True) -> None:
    """Return if `config` can run on `world_size` ranks; else raise ConfigError, of several mistakes for the first.

    Images, checkpoints and devices are not looked at: whoever opens them reports what is wrong there.
    """
    check_values(config)
    if not config.run.dir:
        refuse("run.dir", config.run.dir, "a folder", RunConfig.dir)
    check_resume(config.run)
    check_order(config, "data.crop_scale", "data.crop_ratio")
    for rule in (_check_channels, _check_arch, _check_widths, _check_patches, _check_mask, _check_importance):
        rule(config)
    if config.train.device == "cpu" and config.train.precision == "fp16":
        refuse("train.precision", "fp16", "fp32, bf16 or auto on a CPU", "bf16")
    check_batch(config, world_size)
    if trains:
        check_warm_up("optim.warmup_epochs", config.optim.warmup_epochs, config.train.epochs)


def check_warm_up(key: str, warm_up: float, length: float) -> None:
    """Refuse a warm-up, in the unit of the setting `key`, that is longer than the run: its rate would never be had."""
    if warm_up > length:
        near = math.floor(1000 * length) / 1000
        near = int(near) if near == int(near) else near
        refuse(key, warm_up, f"at most the length of the run, {near} {key.rpartition('_')[2]}", near)


def check_order(config: Any, *keys: str) -> None:
    """Refuse a pair of numbers that is not from small to large."""
    for key in keys:
        low, high = flatten(config)[key]
        if low > high:
            refuse(key, (low, high), "from small to large", (high, low))


def check_resume(run: RunConfig) -> None:
    """Refuse a `run.resume` that is nothing to go on from, and one that `run.overwrite` would remove."""
    words = ("never", "auto")
    if run.resume not in words and os.sep not in run.resume and not os.path.exists(run.resume):
        refuse("run.resume", run.resume, "never, auto or the path of a checkpoint", nearest(run.resume, words))
    if run.resume == "auto" and run.overwrite:
        refuse("run.overwrite", True, "false with run.resume=auto, which goes on with what it would remove", False)


def _check_channels(config: Config) -> None:
    data = config.data
    for key, value in (("data.mean", data.mean), ("data.std", data.std)):
        if len(value) != data.channels:
            near = (value + settings()[key].default[-1:] * data.channels)[: min(data.channels, 8)]
            refuse(key, value, f"of data.channels={data.channels} values", near)
    if len(data.max_value) not in (0, 1, data.channels):
        refuse("data.max_value", data.max_value, f"one value, or data.channels={data.channels}", data.max_value[:1])


def _check_arch(config: Config) -> None:
    import timm  # takes seconds to import, which --help need not wait for
    from timm.models import is_model_in_modules

    if not is_model_in_modules(config.model.arch, VIT_MODULES + STEM_MODULES):
        names = [name for module in VIT_MODULES for name in timm.list_models(module=module, exclude_filters="test_*")]
        refuse(
            "model.arch",
            config.model.arch,
            "of timm's class VisionTransformer or Eva",
            nearest(config.model.arch, names),
        )
    check_tag("model.arch", config.model.arch)


def check_tag(key: str, arch: str) -> None:
    """Refuse a name of timm's with a tag, `ARCH.TAG`: it means weights, and an architecture has none."""
    name, dot, _ = arch.partition(".")
    if dot:
        refuse(key, arch, f"a name without a tag, which means weights: take them by ccmim import timm:{name}.TAG", name)


def _check_widths(config: Config) -> None:
    """Refuse a width of the decoder that its heads do not divide; that of the encoder is its architecture's matter."""
    dim, heads = config.decoder.dim, config.decoder.num_heads
    if dim % 4:
        must = "a multiple of 4 (sine and cosine on two axes)"
        refuse("decoder.dim", dim, must, nearest_multiple(dim, math.lcm(4, heads)))
    if dim % heads:
        refuse("decoder.num_heads", heads, f"a divisor of decoder.dim={dim}", nearest_divisor(heads, dim))


def _check_patches(config: Config) -> None:
    size, target = config.data.image_size, config.target
    if config.model.patch_size == 1:
        refuse("model.patch_size", 1, "0 (the architecture's own) or in [2, 32]", 2)
    patch = patch_size(config)
    if not patch:
        return
    near = tuple(nearest_multiple(side, patch) for side in size)
    if near != size:
        refuse("data.image_size", size, f"a multiple of the patch size {patch}", near)
    if target.kind == "hog" and patch % target.hog_cell:
        near = nearest_divisor(target.hog_cell, patch)
        refuse("target.hog_cell", target.hog_cell, f"a divisor of the patch size {patch}", near)


def _check_mask(config: Config) -> None:
    """Refuse what leaves no patch visible, or none masked: of a ratio, int(patches * (1 - ratio)) are visible."""
    height, width = config.data.image_size
    patch = patch_size(config) or 2  # unknown: the smallest there is, hence the most patches there can be
    ratio, patches = config.mask.ratio, (height // patch) * (width // patch)
    if patches < 2:
        near = (height, 2 * patch)
        refuse("data.image_size", config.data.image_size, "two patches at least, one of them visible", near)
    if not 0 < ratio < 1 or not 1 <= int(patches * (1 - ratio)) < patches:
        near = 1 - 1 / patches if ratio > 0.5 else 1 / patches
        while int(patches * (1 - near)) < 1:
            near = math.nextafter(near, 0)
        must = f"in (0, 1) and leave both visible and masked ones of {patches} patches"
        refuse("mask.ratio", ratio, must, near if ratio == ratio else settings()["mask.ratio"].default)
    needs_both = config.mask.strategy.startswith("importance") and SCORE_SOURCES[config.score.source].has_bank
    if needs_both and not CONTRASTS[config.contrast.loss].path:
        others = [name for name, source in SCORE_SOURCES.items() if not source.has_bank]
        must = f"one of {', '.join(others)} with contrast.loss={config.contrast.loss}, which has one pass of two"
        refuse("score.source", config.score.source, must, others[0])
    masked = patches - int(patches * (1 - ratio))
    if config.mask.strategy == "block" and config.mask.block_min > masked:
        refuse("mask.block_min", config.mask.block_min, f"at most the {masked} patches that are masked", masked)


def _check_importance(config: Config) -> None:
    """Refuse options of the division where they choose no patch, and more hints than patches stay visible."""
    mask, by = config.mask, ("importance", "importance_sampling")
    shares, temperatures = over_epochs(mask.importance), over_epochs(config.score.temperature)
    if mask.strategy not in by:
        for key, value, near in (("hints", mask.hints, 0.0), ("importance", shares, 1.0)):
            if value not in (near, (near, near)):
                must = f"{near} with mask.strategy={mask.strategy}, which asks for no scores"
                refuse(f"mask.{key}", getattr(mask, key), must, near)
    if mask.strategy != by[1] and temperatures[0] != temperatures[1]:
        must = f"one number with mask.strategy={mask.strategy}, whose masks it does not change"
        refuse("score.temperature", config.score.temperature, must, temperatures[0])
    height, width = config.data.image_size
    if patch := patch_size(config):
        check_hints(config, (height // patch) * (width // patch))


def check_hints(config: Config, patches: int) -> None:
    """Refuse more hints than `mask.ratio` leaves visible of so many patches."""
    keep = int(patches * (1 - config.mask.ratio))
    drawn = max(round(share * (patches - keep)) for share in over_epochs(config.mask.importance))
    if round(config.mask.hints * drawn) > keep:
        must = f"at most {keep} of the {drawn} patches by importance, as many as stay visible"
        refuse("mask.hints", config.mask.hints, must, math.floor(1e4 * keep / drawn) / 1e4)


def over_epochs(value: Scheduled) -> tuple[float, float]:
    """Return a scheduled setting's values in the first and the last epoch."""
    return value if isinstance(value, tuple) else (value, value)


def check_batch(config: Config, world_size: int) -> None:
    """Refuse a batch that its ranks and micro-batches cannot divide, or parts of it that are too small."""
    train, batch = config.train, config.train.batch_size
    parts = train.accumulate * world_size
    split = f"train.accumulate={train.accumulate} x world size {world_size}"
    if batch % parts:
        refuse("train.batch_size", batch, f"a multiple of {split}", nearest_multiple(batch, parts))
    contrast = CONTRASTS[config.contrast.loss]
    if contrast.path and not contrast.negatives and batch // parts < 2:
        must = (
            f"2 images per rank and micro-batch at least, which contrast.loss={config.contrast.loss} looks at ({split})"
        )
        refuse("train.batch_size", batch, must, 2 * parts)
    rows = batch // train.accumulate if config.heads.sync_bn else batch // parts
    if contrast.path and rows < 2:
        must = f"2 images per micro-batch at least, for the heads' BatchNorm ({split})"
        refuse("train.batch_size", batch, must, 2 * parts)


def patch_size(config: Config) -> int:
    """Return the pixels per side of a patch: as set, else from the architecture's name; 0 if neither tells."""
    named = re.search(r"patch(\d{1,2})(?!\d)", config.model.arch)
    return config.model.patch_size or (int(named[1]) if named else 0)


def nearest_multiple(number: int, of: int) -> int:
    """Return the positive multiple of `of` nearest to `number`."""
    return max(1, (number + of // 2) // of) * of


def nearest_divisor(number: int, of: int) -> int:
    """Return the divisor of `of` nearest to `number`."""
    return min((d for d in range(1, of + 1) if of % d == 0), key=lambda d: abs(d - number))
