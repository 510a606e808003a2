"""Who is measured: our presets and the peers, each as a name, its settings or its file, and the arithmetic to expect.

Every variant of ours is a list of settings for `load_config`, here and nowhere else, and `ours` makes a step of it. A
peer is a function of the contract in throughput.py.
"""

# B batch, H height, W width, C channels

import importlib.util
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from naive import SAVINGS, freed_memory, settings_without, without
from torch import Tensor

from ccmim_fast.config.keys import nearest
from ccmim_fast.config.load import load_config
from ccmim_fast.config.schema import Config
from ccmim_fast.data.source import NOTHING_EXCLUDED
from ccmim_fast.data.stream.batch import on_device
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.engine import choices
from ccmim_fast.engine.build import build_bank, build_step, check_device, prepare_step
from ccmim_fast.errors import ConfigError
from ccmim_fast.ranks.session import Session

PEERS = Path(__file__).parent / "peers"
LR = 1.5e-4  # of every contender; optim.base_lr: large enough that a few steps lower the loss, if the step is right

Step = Callable[[], Tensor]


class Contender(NamedTuple):
    """One line of the comparison: ours, by `settings`, or a peer, by `peer`.

    Attributes:
        settings: for `load_config`; of ours alone.
        without: savings that the step lacks, see `naive.SAVINGS`; of ours alone.
        peer: path.py:function.
        packages: what a peer needs, as it is imported.
        install: the command that installs it.
        precision: its own, whatever the others run in.
        commit: of this repository, whose step it is; empty: the present one's.
        design: GFLOP per image at 224 pixels by the architecture, from the design's table of arithmetic, which knows
            none of the savings.
        differs: how a peer's work differs from that of mae-8.
        off: the contender that is the same method with everything of ours off; of ours alone.
    """

    name: str
    settings: list[str] = []  # noqa: RUF012 (never changed)
    peer: str = ""
    packages: tuple[str, ...] = ()
    install: str = ""
    precision: str = ""
    without: tuple[str, ...] = ()
    commit: str = ""
    design: dict[str, float] = {}  # noqa: RUF012
    differs: str = ""
    off: str = ""

    @property
    def installed(self) -> bool:
        return all(importlib.util.find_spec(package) is not None for package in self.packages)

    @property
    def absent(self) -> str:
        """What is said where it is not installed."""
        return f"not installed; {self.install}"

    @property
    def measured_against(self) -> bool:
        """Whether the others are given as a ratio to it."""
        return bool(self.peer or self.commit) or self.name.startswith("naive") or self.name == "mae-8"


def _design(base: float, large: float) -> dict[str, float]:
    return {"vit_base_patch16_224": base, "vit_large_patch16_224": large}


_MAE_8, _CCMIM, _ALL, _AUTHORS = _design(58.5, 124.2), _design(60.9, 192.5), _design(93.1, 310.6), _design(119.3, 338.6)
_THIRD, _FIFTH = _design(43.5, 131.5), _design(40.0, 119.3)
_BANK = ["--config=ccmim_vit_base"]
# The design ends the pass for the scores with [CLS] alone, a saving.
_ALL_WHOLE = _design(95.7, 315.2)
_OFF = tuple(SAVINGS)
_EAGER = "--train.compile=off"
CONTENDERS = {
    c.name: c
    for c in (
        Contender("mae-8", ["--config=mae_vit_base"], design=_MAE_8, off="naive-mae"),
        Contender("mae-2", ["--config=mae_vit_base", "--decoder.depth=2"], design=_design(34.7, 100.5)),
        Contender("ccmim-first", ["--config=ccmim_vit_base_eq4"], design=_CCMIM),
        Contender("ccmim-bank", ["--config=ccmim_vit_base"], design=_CCMIM, off="naive-ccmim"),
        Contender(
            "ccmim-third", ["--config=ccmim_vit_base", "--teacher.tokens=0.3333"], design=_THIRD, off="naive-ccmim"
        ),
        Contender("ccmim-fifth", ["--config=ccmim_vit_base", "--teacher.tokens=0.2"], design=_FIFTH, off="naive-ccmim"),
        Contender(
            "ccmim-third-int8",
            ["--config=ccmim_vit_base", "--teacher.tokens=0.3333", "--teacher.precision=int8"],
            design=_THIRD,
            off="naive-ccmim",
        ),
        Contender("ccmim-all", ["--config=ccmim_vit_base", "--score.source=all"], design=_ALL, off="naive-ccmim"),
        Contender("ccmim-official", ["--config=ccmim_vit_base_official"], design=_AUTHORS, off="naive"),
        Contender(
            "transformers",
            peer=f"{PEERS / 'transformers_mae.py'}:build",
            packages=("transformers",),
            install="pip install transformers",
            design=_MAE_8,
            differs="its decoder ends in all patches, of which the loss takes the masked ones",
        ),
        Contender(
            "stable-pretraining",
            peer=f"{PEERS / 'stable_mae.py'}:build",
            packages=("stable_pretraining", "lightning", "datasets", "hydra", "kornia", "loguru", "requests_cache"),
            # Its own list allows the two releases of lightning that were compromised (2.6.2, 2.6.3).
            install="pip install --no-deps -r requirements/bench.txt",
            design=_MAE_8,
            differs="it learns the encoder's positions; its decoder has no [CLS], embeds mask tokens like others, and "
            "ends in all patches; the host reads figures of each step",
        ),
        Contender(
            "lightly",
            peer=f"{PEERS / 'lightly_mae.py'}:build",
            packages=("lightly",),
            # With its dependencies it would bring pytorch_lightning, which its MAE does not need.
            install="pip install --no-deps lightly",
            design=_MAE_8,
            differs="its decoder's last block computes all tokens, of which the masked ones are predicted",
        ),
        # The algorithms as they are written down, with everything of ours off: the authors', MAE's, and ccMIM's with
        # scores of all blocks, which take a pass of their own where there is no bank.
        Contender("naive", ["--config=ccmim_vit_base_official", _EAGER], without=_OFF, design=_AUTHORS),
        Contender("naive-mae", ["--config=mae_vit_base", _EAGER], without=_OFF, design=_MAE_8),
        Contender(
            "naive-ccmim", ["--config=ccmim_vit_base", "--score.source=all", _EAGER], without=_OFF, design=_ALL_WHOLE
        ),
    )
}
# The authors run theirs with autocast off: beside whatever precision the others have.
DEFAULT = (*CONTENDERS, "naive-fp32")
PRECISIONS = ("fp32", "bf16", "fp16")


def contender_of(name: str) -> Contender:
    """The contender of a name, which may end in a precision, and then in a commit: `ccmim-bank-fp32@ac1f32c`.

    Raises:
        ConfigError: no such contender, or a commit of what is no preset of ours.
    """
    whole, at, commit = name.partition("@")
    base, _, precision = whole.rpartition("-")
    if precision not in PRECISIONS:
        base, precision = whole, ""
    if base not in CONTENDERS:
        raise ConfigError(f"--only {name}: no such contender; nearest: {nearest(base, CONTENDERS)}")
    contender = CONTENDERS[base]
    if at and (not commit or contender.peer or contender.without):
        of_ours = ", ".join(c.name for c in CONTENDERS.values() if not c.peer and not c.without)
        raise ConfigError(f"--only {name}: a commit comes after one of {of_ours}, as in mae-8@HEAD~1")
    off = f"{contender.off}-{precision}" if contender.off and precision else contender.off
    return contender._replace(name=name, precision=precision, commit=commit, off=off)


TOLERANCE = 0.01
SPARED = 0.06  # by all savings together: at most 5 % (ccmim-first), and the tolerance


def as_expected(contender: Contender, deviation: float) -> bool:
    """Whether a count that is off the design's figure by the share `deviation` is right: ours may be below it."""
    least = -TOLERANCE if contender.peer or contender.without else -SPARED
    return least <= deviation <= TOLERANCE


def ours_config(given: list[str], arch: str, shape: tuple[int, ...], precision: str) -> Config:
    """The configuration of ours: `given`, and what the options of the benchmark say; `shape` is that of the images.

    Raises:
        ConfigError: a setting.
    """
    count, height, width, channels = shape
    said = [
        f"--model.arch={arch}",
        f"--data.image_size=[{height}, {width}]",
        f"--data.channels={channels}",
        f"--train.batch_size={count}",
        "--train.accumulate=1",
        f"--train.precision={precision}",
    ]
    return load_config([*given, *said], "ccmim bench")


def ours(given: list[str], arch: str, images_BHWC: Tensor, precision: str, savings_off: Collection[str] = ()) -> Step:
    """Build the trainer's own step on `images_BHWC` [B, H, W, C] uint8, on their device; a call returns the loss."""
    device, count = images_BHWC.device, len(images_BHWC)
    config = ours_config([*given, *settings_without(savings_off)], arch, tuple(images_BHWC.shape), precision)
    here = Session(0, 1, device)
    check_device(config, here)
    with freed_memory(savings_off):
        train_step = build_step(config, here)
    if savings_off:
        without(train_step, savings_off)
    plan = Plan(MadeSizes(), seed=0, global_batch=count)
    samples = config.train.epochs * plan.samples
    chosen = choices.choose(train_step, count, here, samples=samples)
    choices.apply(chosen, train_step)
    prepared = prepare_step(train_step, count, choices.to_compile(chosen, train_step, here, samples))
    choices.choose_form(chosen, train_step, count, here)
    # In memory, so that nothing is written on a disk.
    bank = build_bank(config, plan, here, Path())
    boxes_B4 = np.tile([0.1, 0.2, 0.7, 0.6], (count, 1))
    cursor = 0

    def step() -> Tensor:
        nonlocal cursor
        ids_B = plan.step_ids(cursor, range(1)).reshape(-1)  # other samples, so other masks
        batches = [on_device(images_BHWC, ids_B, np.zeros_like(ids_B), None, boxes_B4, device)]
        result = prepared(batches if bank is None else bank.read(cursor, batches), LR)
        if bank is not None:
            bank.write([seen.maps_BGG for seen in result.seen])
        cursor += count
        return result.total

    return step


class MadeSizes:
    """A `Source` of as many images as ImageNet's, of which nothing but the number is asked."""

    channels, labels_N, class_names, fingerprint = 3, None, (), "made"
    sizes_N2, excluded_X = np.full((1_281_167, 2), 256, dtype=np.int32), NOTHING_EXCLUDED

    def __len__(self) -> int:
        return len(self.sizes_N2)


def load_peer(where: str) -> Callable[[str, Tensor, str], Step]:
    """The function `path.py:function`; its folder is where it finds its own modules.

    Raises:
        ConfigError: no such file or function.
    """
    path, _, name = where.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(f"--peer={where}: no such file; write --peer path.py:function")
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ConfigError(f"--peer={where}: no function {name!r} in {path}")
    return getattr(module, name)
