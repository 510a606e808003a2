"""This module is for code that runs on the null device: it builds steps, and batches as a run's loader yields."""

import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from nullgpu.counters import bools_are

from ccmim_fast.bank.bank import ScoreBank
from ccmim_fast.config.load import load_config
from ccmim_fast.config.schema import Config
from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.source import NOTHING_EXCLUDED
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.data.stream.torch_loader import TorchLoader
from ccmim_fast.engine.build import build_bank, build_step, check_device, choose_shards, prepare_step
from ccmim_fast.engine.compile import GraphedStep
from ccmim_fast.engine.step import StepResult, TrainStep
from ccmim_fast.ranks.session import Session

LR = 1e-4


class Noise:
    """Labelled images of noise, in memory; the interface is `data.source.Source`."""

    class_names, fingerprint, excluded_X = ("a", "b"), "noise", NOTHING_EXCLUDED
    dtype = np.dtype(np.uint8)

    def __init__(self, count: int, channels: int):
        self.sizes_N2 = np.full((count, 2), (40, 50), dtype=np.int32)
        self.labels_N, self.channels = np.arange(count) % 2, channels

    def __len__(self) -> int:
        return len(self.sizes_N2)

    def name(self, index: int) -> str:
        return str(index)

    def decode(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (*self.sizes_N2[index], self.channels), dtype=np.uint8)


class Run(NamedTuple):
    """A run's parts between its loader and its loop: the step, eager or graphed, its bank and the loader's batches."""

    step: TrainStep
    step_fn: TrainStep | GraphedStep
    batches: Sequence[Batch]
    bank: ScoreBank | None

    def take(self) -> StepResult:
        """Take one step as `engine.pretraining` does, with the bank before and after it."""
        batches = self.batches if self.bank is None else self.bank.read(0, self.batches)
        result = self.step_fn(batches, LR)
        if self.bank is not None:
            self.bank.write([seen.maps_BGG for seen in result.seen])
        return result


def build_run(settings: Sequence[str], here: Session | None = None) -> Run:
    """Build a run by its command line, warmed up as a run is; no step is taken yet. `here`: None is one process."""
    config, here = load_config([*settings], "test"), here or Session(0, 1, torch.device("cuda"))
    check_device(config, here)
    # torch asks whether a learning rate on the device is positive.
    with bools_are(True):
        step = build_step(config, here)
    plan, batches = _loaded(config, here)
    with tempfile.TemporaryDirectory() as folder:
        bank = build_bank(config, plan, here, Path(folder))
    return Run(step, prepare_step(step, plan.micro_batch_size), batches, bank)


def _loaded(config: Config, here: Session) -> tuple[Plan, list[Batch]]:
    """Return the plan of a rank's run over noise, and the batches of its first step."""
    train, images = config.train, Noise(2 * config.train.batch_size, config.data.channels)
    size = {"global_batch": train.batch_size, "accumulate": train.accumulate}
    ranks = {"rank": here.rank, "world_size": here.world_size, "partitions": choose_shards(config)}
    plan = Plan(images, seed=0, flip=True, **size, **ranks)
    bad_samples = BadSamples(images, "error", 0.0)
    stream = TorchLoader(plan, bad_samples, config.data.image_size, 1, here.device).stream(0)
    batches = list(islice(stream, train.accumulate))
    stream.close()
    return plan, batches
