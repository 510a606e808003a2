"""Every preset loads, says where it comes from and what it costs, and holds only what differs from the defaults."""

import re

import pytest
import yaml

from ccmim_fast.config.keys import flatten
from ccmim_fast.config.load import difference, load_config, presets
from ccmim_fast.config.schema import Config
from ccmim_fast.config.validate import patch_size, validate

PRESETS = [
    *(f"{method}_vit_{size}" for method in ("ccmim", "mae") for size in ("small", "base", "large", "huge")),
    "ccmim_vit_base_1080ti",
    "ccmim_vit_base_eq4",
    "ccmim_vit_base_official",
    "ccmim_vit_small_patch4_32",
    "demo",
]
SIZES = {"small": (384, 12), "base": (768, 12), "large": (1024, 24), "huge": (1280, 32)}  # width, blocks (ViT; MAE)


def preset(name: str) -> Config:
    return load_config(["--config", name], "ccmim")


def header(name: str) -> str:
    return "".join(line for line in presets()[name].read_text().splitlines(True) if line.startswith("#"))


def gflop(config: Config) -> float:
    """GFLOP of one image's training step as the design counts them: matrix products alone, backward = 2 x forward.

    The masked branch and the scoring pass have no backward. Eq. 4 at one block is counted as one key projection.
    """
    width, depth = SIZES[config.model.arch.split("_")[1]] if not config.model.embed_dim else (0, 0)
    width, depth = config.model.embed_dim or width, config.model.depth or depth
    patch = patch_size(config)
    patches = config.data.image_size[0] * config.data.image_size[1] // patch**2
    visible = int(patches * (1 - config.mask.ratio))
    pixels = patch * patch * config.data.channels

    def blocks(count: int, tokens: int, dim: int) -> int:
        return count * (24 * tokens * dim**2 + 4 * tokens**2 * dim)

    decoder = blocks(config.decoder.depth, patches + 1, config.decoder.dim)
    decoder += 2 * config.decoder.dim * ((visible + 1) * width + patches * pixels)
    # The patch embedding needs no gradient of the pixels: 2 x forward in all.
    total = 3 * (blocks(depth, visible + 1, width) + decoder) + 2 * (2 * patches * pixels * width)
    if config.contrast.loss != "none":
        total += blocks(depth, patches - visible + 1, width)
    if config.mask.strategy.startswith("importance"):
        keys = 2 * patches * width**2
        if config.score.normalise == "softmax":  # the authors' code computes its scoring pass in full
            total += blocks(depth, patches + 1, width)
        else:
            total += keys + (blocks(depth - 1, patches + 1, width) + keys if config.score.source == "all" else 0)
    return total / 1e9


def test_all_are_there():
    assert sorted(presets()) == sorted(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_loads_and_holds_only_differences(name):
    config = preset(name)
    validate(config)
    document = yaml.safe_load(presets()[name].read_text()) or {}
    flat = {f"{section}.{key}": value for section, part in document.items() for key, value in part.items()}
    differs = {key: new for key, _, new in difference(Config(), config)}
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in flat.items()} == differs


@pytest.mark.parametrize("name", PRESETS)
def test_opens_with_source_cost_and_expectation(name):
    text = presets()[name].read_text()
    opening = header(name)
    assert text.startswith(opening)
    lines = opening.splitlines()
    for word in ("Source", "Cost", "Expected"):
        assert sum(line.startswith(f"# {word}: ") for line in lines) == 1, word


@pytest.mark.parametrize("name", PRESETS)
def test_the_cost_is_that_of_the_settings(name):
    stated = float(re.search(r"^# Cost: ([\d.]+) GFLOP per image", header(name), re.MULTILINE)[1])
    assert gflop(preset(name)) == pytest.approx(stated, abs=0.1)


def test_the_cost_is_counted_as_in_the_design():
    # design.md, "Arithmetic of one image", ViT-B and ViT-L.
    stated = {"mae_vit_base": 58.5, "mae_vit_large": 124.2, "ccmim_vit_base": 60.9, "ccmim_vit_large": 192.5}
    stated |= {"ccmim_vit_base_eq4": 60.9, "ccmim_vit_base_official": 119.3}
    for name, value in stated.items():
        assert gflop(preset(name)) == pytest.approx(value, abs=0.1)
    for name, value in {"ccmim_vit_base": 93.1, "ccmim_vit_large": 310.6}.items():
        assert gflop(load_config([f"--config={name}", "--score.source=all"], "test")) == pytest.approx(value, abs=0.1)


def test_paper_preset_is_the_defaults():
    assert preset("ccmim_vit_base") == Config()


def test_figures_of_the_authors_code():
    config = preset("ccmim_vit_base_official")
    assert config.train.batch_size == 32 * 32 * 4
    assert config.train.batch_size // config.train.accumulate == 1024  # negatives
    assert (config.train.epochs, config.optim.warmup_epochs, config.train.precision) == (800, 40, "fp32")
    assert (config.contrast.loss, config.contrast.temperature, config.contrast.weight) == ("moco", 0.5, 0.1)
    assert (config.score.source, config.score.normalise, config.mask.noise) == ("all", "softmax", "uniform")
    assert (config.decoder.depth, config.data.flip) == (8, True)
    # BatchNorm of each process, Xavier for the heads, decay of tokens.
    assert (config.heads.sync_bn, config.heads.init, config.optim.decay_tokens) == (False, "xavier", True)
    validate(config, world_size=32)


@pytest.mark.parametrize("size", SIZES)
def test_mae_presets_differ_from_one_another_in_the_architecture_alone(size):
    config = preset(f"mae_vit_{size}")
    # ViT-H's weights are divided among ranks, which no result depends on.
    alone = {"model.arch", *(["train.parallel"] if size == "huge" else [])}
    assert {key for key, *_ in difference(preset("mae_vit_base"), config)} <= alone
    assert (config.mask.strategy, config.contrast.loss, config.decoder.depth) == ("random", "none", 8)
    assert (config.train.batch_size, config.train.epochs, config.data.flip) == (4096, 800, True)
    assert config.optim.decay_tokens
    assert {key for key, *_ in difference(Config(), preset(f"ccmim_vit_{size}"))} <= alone


def test_small_image_and_demo_rates():
    small, demo = preset("ccmim_vit_small_patch4_32"), preset("demo")
    assert small.optim.base_lr * small.train.batch_size / 256 == pytest.approx(2e-4)
    assert demo.optim.base_lr * demo.train.batch_size / 256 == pytest.approx(1e-3, rel=1)
    assert flatten(demo)["data.source"] == "shapes"
