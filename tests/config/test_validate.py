"""What cannot run is refused with the nearest value that can."""

import dataclasses
import math
import os

import pytest
import timm
import torch

from ccmim_fast.config.keys import build, flatten, settings
from ccmim_fast.config.load import load_config
from ccmim_fast.config.schema import Config
from ccmim_fast.config.validate import nearest_divisor, nearest_multiple, patch_size, validate
from ccmim_fast.errors import ConfigError

RANGES = {key: setting.unit.within for key, setting in settings().items() if setting.unit.within}


def config_of(**values) -> Config:
    """`config_of(mask__ratio=0.5)`: the defaults with some settings changed."""
    return build(flatten(Config()) | {key.replace("__", "."): value for key, value in values.items()})


def message_of(world_size: int = 1, **values) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(config_of(**values), world_size)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message


def test_defaults_are_valid():
    validate(Config())


def test_every_number_has_a_range():
    numbers = {
        key
        for key, setting in settings().items()
        if type(setting.default) in (int, float) or isinstance(setting.default, tuple)
    }
    assert set(RANGES) == numbers - {"mask.ratio"}


@pytest.mark.parametrize("key", [*RANGES, "mask.ratio"])
def test_numbers_that_are_none(key):
    default = settings()[key].default
    for bad in (math.nan, math.inf, -math.inf, -2):
        value = (bad, *default[1:]) if isinstance(default, tuple) else bad  # of max_value, which is empty, one
        message = message_of(**{key: value})
        assert message.startswith(f"{key}=")
        assert "nearest valid is" in message


@pytest.mark.parametrize("key", RANGES)
def test_ends_of_ranges(key):
    """A closed end is in the range and is what is named for values beyond it; an open end is not in it."""
    default, interval = settings()[key].default, RANGES[key]
    default = (1.0,) if default == () else default
    low, high = interval[1:-1].split(", ")
    for end, closed, beyond in ((low, interval[0] == "[", -1), (high, interval[-1] == "]", 1)):
        if end == "inf":
            continue
        number = type(default[0] if isinstance(default, tuple) else default)(float(end))
        wrong = number + beyond if closed else number
        named = number if closed else None
        message = message_of(**{key: (wrong,) * len(default) if isinstance(default, tuple) else wrong})
        assert f"must be in {interval}" in message
        if named is not None:
            shown = f"[{', '.join([str(named)] * len(default))}]" if isinstance(default, tuple) else str(named)
            assert message.endswith(f"nearest valid is {shown}")


# Options, the first of which is refused; what it must be; the nearest valid value.
REFUSED = [
    ("run.dir=", "a folder", "runs/pretrain"),
    ("run.resume=atuo", "never, auto or the path of a checkpoint", "auto"),
    ("run.overwrite=true run.resume=auto", "false with run.resume=auto, which goes on with what it", "false"),
    ("data.root=a\0b", "text that a file name can hold", "ab"),
    ("run.dir=a\ud800b", "text that a file name can hold", "ab"),
    ("data.image_size=[225,224]", "a multiple of the patch size 16", "[224, 224]"),
    ("data.image_size=[32,239]", "a multiple of the patch size 16", "[32, 240]"),
    ("data.image_size=[3,224]", "a multiple of the patch size 16", "[16, 224]"),
    ("data.image_size=[64,64] model.patch_size=12", "a multiple of the patch size 12", "[60, 60]"),
    ("data.image_size=[256,256] model.arch=vit_huge_patch14_224", "a multiple of the patch size 14", "[252, 252]"),
    ("data.image_size=[16,16] mask.ratio=0.5", "two patches at least", "[16, 32]"),
    ("data.crop_scale=[0,1]", "in (0, 1]", "[0.2, 1.0]"),
    ("data.crop_scale=[0.5,1.1]", "in (0, 1]", "[0.5, 1.0]"),
    ("data.mean=[0.5] data.std=[1,1,1]", "of data.channels=3 values", "[0.5, 0.406, 0.406]"),
    ("data.std=[1,1,1] data.mean=[0.5] data.channels=1", "of data.channels=1 values", "[1.0]"),
    ("data.mean=[0.5,123.7,0.4]", "in [-1, 1]", "[0.5, 1.0, 0.4]"),
    ("data.max_value=[4095,1023]", "one value, or data.channels=3", "[4095.0]"),
    ("data.max_value=0", "in (0, inf)", "[0.5]"),
    ("data.std=[0.5,0,0.5]", "in (0, inf)", "[0.5, 0.224, 0.5]"),
    ("data.crop_scale=[1,0.2]", "from small to large", "[0.2, 1.0]"),
    ("data.crop_ratio=[2,0.5]", "from small to large", "[0.5, 2.0]"),
    ("model.arch=vit_bass_patch16_224", "of timm's class VisionTransformer or Eva", "vit_base_patch16_224"),
    ("model.patch_size=1", "0 (the architecture's own) or in [2, 32]", "2"),
    ("model.patch_size=33", "in [0, 32]", "32"),
    ("model.arch=vit_tiny_patch16_224.nonsense", "a name without a tag, which means weights", "vit_tiny_patch16_224"),
    ("model.arch=vit_tiny_patch16_224.augreg_in21k", "a name without a tag", "vit_tiny_patch16_224"),
    ("decoder.dim=513", "a multiple of 4", "512"),
    ("decoder.dim=50 decoder.num_heads=12", "a multiple of 4", "48"),
    ("decoder.num_heads=15", "a divisor of decoder.dim=512", "16"),
    ("optim.betas=[0.9,1]", "in [0, 1)", "[0.9, 0.95]"),
    ("optim.ema_decay=1", "in [0, 1)", "0.0"),
    ("model.drop_path=1", "in [0, 1)", "0.0"),
    ("score.temperature=0", "in (0, inf)", "1.0"),
    ("contrast.temperature=0", "in (0, inf)", "0.2"),
    ("optim.base_lr=-1e-9", "in [0, inf)", "0.0"),
    ("train.epochs=0 optim.warmup_epochs=0", "in [1, 2147483647]", "1"),
    ("optim.warmup_epochs=10.5 train.epochs=10", "at most the length of the run, 10 epochs", "10"),
    ("optim.warmup_epochs=40 train.epochs=1", "at most the length of the run, 1 epochs", "1"),
    ("run.keep=0", "in [1, 2147483647]", "1"),
    ("run.keep_every=-1", "in [0, 2147483647]", "0"),
    ("seed=4294967296", "in [0, 4294967295]", "4294967295"),
    ("seed=-1", "in [0, 4294967295]", "0"),
    ("target.hog_cell=5 target.kind=hog", "a divisor of the patch size 16", "4"),
    ("mask.block_min=148 mask.strategy=block", "at most the 147 patches that are masked", "147"),
    ("mask.hints=0.5", "at most 49 of the 147 patches by importance, as many as stay visible", "0.3333"),
    ("mask.hints=0.9 mask.importance=[0.1,0.5]", "at most 49 of the 74 patches by importance", "0.6621"),
    ("mask.hints=1", "in [0, 1)", "0.0"),
    ("mask.hints=0.1 mask.strategy=random", "0.0 with mask.strategy=random, which asks for no scores", "0.0"),
    ("mask.importance=0.5 mask.strategy=block", "1.0 with mask.strategy=block, which asks for no scores", "1.0"),
    ("mask.importance=[1,0.5] mask.strategy=random", "1.0 with mask.strategy=random", "1.0"),
    ("mask.importance=[0.5,1.5]", "in [0, 1]", "[0.5, 1.0]"),
    ("score.temperature=[4,0]", "in (0, inf)", "[4.0, 1.0]"),
    ("score.temperature=[4,1] mask.strategy=importance", "one number with mask.strategy=importance", "4.0"),
    ("score.temperature=[4,1] mask.strategy=random", "one number with mask.strategy=random", "4.0"),
    ("train.precision=fp16 train.device=cpu", "fp32, bf16 or auto on a CPU", "bf16"),
    ("train.batch_size=1", "2 images per micro-batch at least, for the heads' BatchNorm", "2"),
    ("train.batch_size=1023 train.accumulate=2", "a multiple of train.accumulate=2 x world size 1", "1024"),
]


@pytest.mark.parametrize(("options", "must", "near"), REFUSED)
def test_what_cannot_run(options, must, near):
    argv = [f"--{option}" for option in options.split(" ")]
    with pytest.raises(ConfigError) as caught:
        load_config(argv, "ccmim")
    key, _, _ = options.partition("=")
    message = str(caught.value)
    assert message.startswith(f"{key}=")
    assert f": must be {must}" in message
    assert message.endswith(f"; nearest valid is {near}")
    assert len(message.splitlines()) == 1
    # The advice holds: with that value, the others as they are, it runs.
    load_config([f"--{key}={near}", *argv[1:]], "ccmim")


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5, -0.5, 0.999, 1e-20, 5e-324])
def test_mask_ratio(ratio):
    message = message_of(mask__ratio=ratio)
    assert message.startswith(f"mask.ratio={ratio}: must be in (0, 1) and leave both visible and masked ones of 196")
    validate(config_of(mask__ratio=float(message.split()[-1])))


@pytest.mark.parametrize("side", range(2, 40))
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_mask_ratio_that_is_named_is_valid_for_every_grid(side, ratio):
    values = {"data__image_size": (16, 16 * side)}
    named = float(message_of(**values, mask__ratio=ratio).split()[-1])
    validate(config_of(**values, mask__ratio=named))
    assert int(side * (1 - named)) in ((1,) if ratio else (side - 1, side - 2))


def test_sizes_are_checked_only_where_the_patch_is_known():
    assert patch_size(config_of(model__arch="flexivit_small")) == 0
    validate(config_of(model__arch="flexivit_small", data__image_size=(240, 240)))
    validate(config_of(model__patch_size=5, data__image_size=(25, 35)))


@pytest.mark.parametrize(
    ("arch", "patch"),
    [("vit_base_patch16_224", 16), ("vit_huge_patch14_224", 14), ("vit_base_patch16_18x2_224", 16), ("test_vit", 0)],
)
def test_patch_size_of_an_architecture(arch, patch):
    assert patch_size(config_of(model__arch=arch)) == patch
    assert patch_size(config_of(model__arch=arch, model__patch_size=8)) == 8
    with torch.device("meta"):
        own = timm.create_model(arch).patch_embed.patch_size
    assert patch in (0, *own)


def test_architectures():
    for arch in ("vit_tiny_patch16_224", "vit_huge_patch14_224", "deit_small_patch16_224", "eva02_tiny_patch14_224"):
        validate(config_of(model__arch=arch))
    for arch in ("", "x" * 5000, "swin_base_patch4_window7_224", "\udcff"):
        assert "must be of timm's class VisionTransformer or Eva" in message_of(model__arch=arch)


@pytest.mark.parametrize(
    ("world", "values", "valid"),
    [
        (1, {"batch_size": 2}, 0),
        (2, {"batch_size": 2}, 0),
        (2, {"batch_size": 2, "sync_bn": False}, 4),
        (4, {"batch_size": 8, "accumulate": 2}, 0),
        (4, {"batch_size": 12, "accumulate": 2}, 16),
        (4, {"batch_size": 1}, 4),
        (2, {"batch_size": 2, "loss": "align"}, 4),
        (2, {"batch_size": 4, "loss": "align"}, 0),
        (3, {"batch_size": 1024}, 1023),
        (1, {"batch_size": 4, "accumulate": 4}, 8),
        (1, {"batch_size": 4, "accumulate": 4, "loss": "none", "source": "all"}, 0),
    ],
)
def test_batch_and_world_size(world, values, valid):
    sections = {"sync_bn": "heads", "loss": "contrast", "source": "score"}
    values = {f"{sections.get(name, 'train')}__{name}": value for name, value in values.items()}
    if not valid:
        validate(config_of(**values), world)
        return
    message = message_of(world, **values)
    assert message.endswith(f"nearest valid is {valid}")
    assert f"world size {world}" in message
    validate(config_of(**values | {"train__batch_size": valid}), world)


def test_resume_takes_any_path(tmp_path, monkeypatch):
    for path in ("never", "auto", "runs/gone/checkpoints/step_00000001", "./step_00000001"):
        validate(config_of(run__resume=path))
    monkeypatch.chdir(tmp_path)
    os.mkdir("step_00000001")
    validate(config_of(run__resume="step_00000001"))


def test_masks_of_every_strategy():
    for strategy in ("random", "block", "importance"):
        validate(config_of(mask__strategy=strategy))
    validate(config_of(mask__strategy="random", mask__block_min=1000))


def test_nearest_multiple_and_divisor():
    assert [nearest_multiple(n, 16) for n in (1, 7, 16, 23, 24, 40, 225)] == [16, 16, 16, 16, 32, 48, 224]
    assert [nearest_divisor(n, 48) for n in (1, 5, 7, 14, 30, 100)] == [1, 4, 6, 12, 24, 48]


def test_validate_changes_nothing():
    config = Config()
    before = dataclasses.asdict(config)
    validate(config, 4)
    assert dataclasses.asdict(config) == before
