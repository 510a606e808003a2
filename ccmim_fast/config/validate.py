"""Refuses a configuration that cannot run, with one line that names the key, its value and the nearest valid one."""

import math
import os
import re
from typing import Any, NoReturn

from ccmim_fast.config.keys import Setting, flatten, nearest, settings, show
from ccmim_fast.config.schema import Config
from ccmim_fast.errors import ConfigError

COUNT = "[1, 2147483647]"  # int32: what the kernels' 32-bit words (ccmim_kernels/philox.py) and torch's sizes hold
COUNT_OR_0 = "[0, 2147483647]"
WIDTH = "[4, 65536]"  # ten times the widest published ViT (ViT-22B: 6144)
WIDTH_OR_0 = "[0, 65536]"

# Every number's range; of a tuple, each element's. A round bracket leaves the end out. mask.ratio depends on the grid.
RANGES = {
    "seed": "[0, 4294967295]",
    "run.save_every": COUNT,
    "run.keep": COUNT,
    "run.keep_every": COUNT_OR_0,
    "run.log_every": COUNT,
    "data.image_size": "[2, 65536]",
    "data.channels": "[1, 65536]",
    "data.mean": "[0, 1]",
    "data.std": "(0, inf)",
    "data.crop_scale": "(0, 1]",
    "data.crop_ratio": "(0, inf)",
    "data.max_bad": "[0, 1]",
    "data.window": "[0, 2147483647]",
    "data.workers": "[0, 4096]",
    "data.samples": COUNT,
    "data.classes": "[2, 6]",
    "model.patch_size": "[0, 32]",
    "model.embed_dim": WIDTH_OR_0,
    "model.depth": COUNT_OR_0,
    "model.num_heads": WIDTH_OR_0,
    "model.drop_path": "[0, 1)",
    "score.block": COUNT_OR_0,
    "score.temperature": "(0, inf)",
    "score.grid": "[1, 256]",
    "score.momentum": "[0, 1)",
    "score.blocks": COUNT_OR_0,
    "score.device_gb": "[0, inf)",
    "score.host_gb": "[0, inf)",
    "score.shards": COUNT_OR_0,
    "mask.block_min": COUNT,
    "decoder.depth": COUNT,
    "decoder.dim": WIDTH,
    "decoder.num_heads": "[1, 65536]",
    "target.hog_bins": "[1, 180]",  # one per degree
    "target.hog_cell": "[1, 32]",
    "heads.dim": "[1, 65536]",
    "contrast.weight": "[0, inf)",
    "contrast.temperature": "(0, inf)",
    "optim.base_lr": "[0, inf)",
    "optim.min_lr": "[0, inf)",
    "optim.weight_decay": "[0, inf)",
    "optim.betas": "[0, 1)",
    "optim.warmup_epochs": "[0, inf)",
    "optim.clip_grad": "[0, inf)",
    "optim.ema_decay": "[0, 1)",
    "train.epochs": COUNT,
    "train.batch_size": COUNT,
    "train.accumulate": COUNT,
    "train.max_steps": COUNT_OR_0,
    "watch.bad_steps": COUNT,
    "watch.spike": "[0, inf)",
    "watch.timeout": "(0, 100000)",  # two months
    "train.profile": "[0, 100]",  # a ViT-B step is about 10,000 events of the trace
}


def validate(config: Config, world_size: int = 1) -> None:
    """Returns if `config` can run on `world_size` ranks.

    Images, checkpoints and devices are not looked at: whoever opens them reports what is wrong there.

    Raises:
        ConfigError: one line; of several mistakes the first.
    """
    check_values(flatten(config), settings(), RANGES)
    for check in (_check_run, _check_images, _check_arch, _check_widths, _check_patches, _check_mask, _check_device):
        check(config)
    _check_batch(config, world_size)


def check_values(values: dict[str, Any], known: dict[str, Setting], ranges: dict[str, str]) -> None:
    """Refuse a value beyond its range, and text that no file name can hold.

    Args:
        values: by dotted key.
        known: the settings of the schema.
        ranges: intervals such as "[0, 1)", by key.
    """
    for key, interval in ranges.items():
        _check_range(key, values[key], interval, known[key].default)
    for key, value in values.items():
        if isinstance(value, str) and "\0" in value:
            _refuse(key, value, "without NUL characters", value.replace("\0", ""))
        if isinstance(value, str) and value != (possible := _without_halves(value)):
            _refuse(key, value, "text that a file name can hold", possible)


def _refuse(key: str, value: Any, must: str, near: Any) -> NoReturn:
    raise ConfigError(f"{key}={show(value)}: must be {must}; nearest valid is {show(near)}")


def _without_halves(text: str) -> str:
    """`text` without halves of UTF-16 pairs, which YAML can write; those stay that stand for a file name's bytes."""
    return "".join(c for c in text if not "\ud800" <= c <= "\udfff" or "\udc80" <= c <= "\udcff")


def _check_range(key: str, value: Any, interval: str, default: Any) -> None:
    low, high = map(float, interval[1:-1].split(", "))

    def clamp(number: float, fallback: float) -> float:
        """`number` if it is in the interval, else the end it is beyond; `fallback` if that end is left out."""
        if low < number < high or (number == low and interval[0] == "[") or (number == high and interval[-1] == "]"):
            return number
        if number <= low and interval[0] == "[":
            return type(fallback)(low)
        if number >= high and interval[-1] == "]":
            return type(fallback)(high)
        return fallback  # so for nan

    if isinstance(default, tuple):
        fallbacks = default or ((low + high) / 2,)
        near = tuple(clamp(number, fallbacks[min(i, len(fallbacks) - 1)]) for i, number in enumerate(value))
    else:
        near = clamp(value, default)
    if near != value:
        _refuse(key, value, f"in {interval}", near)


def _check_run(config: Config) -> None:
    run = config.run
    if not run.dir:
        _refuse("run.dir", run.dir, "a folder", settings()["run.dir"].default)
    words = ("never", "auto")
    if run.resume not in words and os.sep not in run.resume and not os.path.exists(run.resume):
        _refuse("run.resume", run.resume, "never, auto or the path of a checkpoint", nearest(run.resume, words))
    if run.resume == "auto" and run.overwrite:
        _refuse("run.overwrite", True, "false with run.resume=auto, which goes on with what it would remove", False)


def _check_images(config: Config) -> None:
    data = config.data
    for key, value in (("data.mean", data.mean), ("data.std", data.std)):
        if len(value) != data.channels:
            near = (value + settings()[key].default[-1:] * data.channels)[: min(data.channels, 8)]
            _refuse(key, value, f"of data.channels={data.channels} values", near)
    for key, value in (("data.crop_scale", data.crop_scale), ("data.crop_ratio", data.crop_ratio)):
        if value[0] > value[1]:
            _refuse(key, value, "from small to large", value[::-1])


def _check_arch(config: Config) -> None:
    import timm  # takes seconds to import, which --help need not wait for
    from timm.models import is_model_in_modules

    modules = ("vision_transformer", "deit")
    if not is_model_in_modules(config.model.arch, modules):
        names = [name for module in modules for name in timm.list_models(module=module, exclude_filters="test_*")]
        _refuse("model.arch", config.model.arch, "a timm VisionTransformer", nearest(config.model.arch, names))


def _check_widths(config: Config) -> None:
    for part, dim, heads in (
        ("model", config.model.embed_dim, config.model.num_heads),
        ("decoder", config.decoder.dim, config.decoder.num_heads),
    ):
        key = "embed_dim" if part == "model" else "dim"
        if dim % 4:
            _refuse(f"{part}.{key}", dim, "a multiple of 4 (sine and cosine on two axes)", nearest_multiple(dim, 4))
        if dim and heads and dim % heads:
            _refuse(f"{part}.num_heads", heads, f"a divisor of {part}.{key}={dim}", nearest_divisor(heads, dim))


def _check_patches(config: Config) -> None:
    size, target = config.data.image_size, config.target
    if config.model.patch_size == 1:
        _refuse("model.patch_size", 1, "0 (the architecture's own) or in [2, 32]", 2)
    patch = patch_size(config)
    if not patch:
        return
    near = tuple(nearest_multiple(side, patch) for side in size)
    if near != size:
        _refuse("data.image_size", size, f"a multiple of the patch size {patch}", near)
    if target.kind == "hog" and patch % target.hog_cell:
        near = nearest_divisor(target.hog_cell, patch)
        _refuse("target.hog_cell", target.hog_cell, f"a divisor of the patch size {patch}", near)


def _check_mask(config: Config) -> None:
    """At least one visible and one masked patch; a ratio is turned into int(patches * (1 - ratio)) visible ones."""
    height, width = config.data.image_size
    patch = patch_size(config) or 2  # unknown: the smallest there is, hence the most patches there can be
    ratio, patches = config.mask.ratio, (height // patch) * (width // patch)
    if patches < 2:
        near = (height, 2 * patch)
        _refuse("data.image_size", config.data.image_size, "two patches at least, one of them visible", near)
    if not 0 < ratio < 1 or not 1 <= int(patches * (1 - ratio)) < patches:
        near = 1 - 1 / patches if ratio > 0.5 else 1 / patches
        while int(patches * (1 - near)) < 1:
            near = math.nextafter(near, 0)
        must = f"in (0, 1) and leave both visible and masked ones of {patches} patches"
        _refuse("mask.ratio", ratio, must, near if ratio == ratio else settings()["mask.ratio"].default)
    if (
        config.score.source == "bank"
        and config.mask.strategy.startswith("importance")
        and config.contrast.loss == "none"
    ):
        _refuse("score.source", "bank", "first, block or all with contrast.loss=none, which has one pass of two", "all")
    masked = patches - int(patches * (1 - ratio))
    if config.mask.strategy == "block" and config.mask.block_min > masked:
        _refuse("mask.block_min", config.mask.block_min, f"at most the {masked} patches that are masked", masked)


def _check_device(config: Config) -> None:
    train, devices = config.train, ("auto", "cpu", "cuda")
    if train.device not in devices:
        _refuse("train.device", train.device, f"one of {', '.join(devices)}", nearest(train.device, devices))
    if train.device == "cpu" and train.precision == "fp16":
        _refuse("train.precision", "fp16", "fp32, bf16 or auto on a CPU", "bf16")


def _check_batch(config: Config, world_size: int) -> None:
    train, batch = config.train, config.train.batch_size
    parts = train.accumulate * world_size
    split = f"train.accumulate={train.accumulate} x world size {world_size}"
    if batch % parts:
        _refuse("train.batch_size", batch, f"a multiple of {split}", nearest_multiple(batch, parts))
    rows = batch // train.accumulate if config.heads.sync_bn else batch // parts
    if config.contrast.loss != "none" and rows < 2:
        must = f"2 images per micro-batch at least, for the heads' BatchNorm ({split})"
        _refuse("train.batch_size", batch, must, 2 * parts)


def patch_size(config: Config) -> int:
    """Pixels per side of a patch: as set, else from the architecture's name; 0 if neither tells."""
    named = re.search(r"patch(\d{1,2})(?!\d)", config.model.arch)
    return config.model.patch_size or (int(named[1]) if named else 0)


def nearest_multiple(number: int, of: int) -> int:
    """The positive multiple of `of` nearest to `number`."""
    return max(1, (number + of // 2) // of) * of


def nearest_divisor(number: int, of: int) -> int:
    """The divisor of `of` nearest to `number`."""
    return min((d for d in range(1, of + 1) if of % d == 0), key=lambda d: abs(d - number))
