"""Training with labels: for each batch, step, log; for each epoch, save and test. What is trained is a `Learner`."""

# R losses of a micro-batch

import contextlib
import hashlib
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ccmim_fast.checkpoints import io
from ccmim_fast.config.keys import flatten
from ccmim_fast.config.load import to_yaml
from ccmim_fast.data.source import usable_count
from ccmim_fast.errors import CheckpointError, ConfigError, NumericsError, StoppedError
from ccmim_fast.evaluation.encoders import Weights
from ccmim_fast.evaluation.job import Job
from ccmim_fast.models.precision import choose_precision
from ccmim_fast.optim.ema import averaged_in, build_ema, update_ema_
from ccmim_fast.optim.schedule import scaled_lr, schedule_lr
from ccmim_fast.ranks.session import barrier, broadcast, max_over_ranks, mean_over_ranks
from ccmim_fast.ranks.signals import StopSignals
from ccmim_fast.runs.metrics import Metrics, ProgressLine

# May differ when a run goes on; whatever else does would make it another one.
_FREE = ("run.", "watch.", "train.device", "train.max_steps", "data.workers", "data.root", "data.test")


class Learner(NamedTuple):
    """What is trained, and on what.

    Attributes:
        module: its weights are trained and saved.
        losses: (the module, wrapped where there are several ranks; a micro-batch) -> losses [R], float32, of parts that
            share no weights, or of one. Calls the module once; under autocast.
        optimizer: groups may have `lr_scale`.
        batches: from the place `cursor` of the stream on, `train.accumulate` micro-batches a step, on the device.
        test: figures on the test images, the same on every rank; the module is in eval mode, without gradient.
    """

    module: nn.Module
    losses: Callable[[nn.Module, Any], Tensor]
    optimizer: torch.optim.Optimizer
    batches: Callable[[int], Iterator[Any]]
    test: Callable[[], dict[str, float]]


class Training:
    """One run of a protocol that trains."""

    def __init__(self, job: Job, learner: Learner):
        config, here, folder = job.config, job.here, job.folder
        self.config, self.here, self.learner = config, here, learner
        self.precision = choose_precision(config.train.precision, here.device)
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=self.precision.scaled)
        self.checkpoints, self.samples = folder / "checkpoints", usable_count(job.train.source)
        self.ema, self.encoder = build_ema(learner.module, config.optim.ema), fingerprint(job.weights)
        self.step = self._resume() if config.run.resume == "auto" else 0
        self.module = learner.module
        if here.world_size > 1:
            self.module = DistributedDataParallel(learner.module)
        steps = config.train.steps or -(-config.train.epochs * self.samples // config.train.batch_size)
        self.steps = min(steps, config.train.max_steps or steps)
        self.signals, self.losses, self.since = StopSignals(), [], (self.step, time.perf_counter(), 0.0)
        self.metrics = None
        if here.is_main:
            self.metrics = Metrics(folder, tensorboard=config.run.tensorboard, resume_step=self.step)
        headline = f"{job.train.words()} · {here.world_size} x {here.device}, {self.precision.name}"
        self.progress = ProgressLine(headline, self.steps, self.step, here.is_main, folder / "log.txt")

    def run(self) -> dict[str, float]:
        """Train to the end; returns the figures of the end."""
        try:
            with self.signals, contextlib.closing(self._steps()) as steps:
                for micro_batches in steps:
                    self._train(micro_batches)
                    self._log()
                    if epoch := self._finished_epoch():
                        self._save(epoch)
                        if epoch % self.config.run.test_every == 0 and self.step < self.steps:
                            self._tell(self.test())
            figures = self.test()
            self._tell(figures)
            return figures
        finally:
            self.progress.close()
            if self.metrics is not None:
                self.metrics.close()

    def _steps(self) -> Iterator[list[Any]]:
        """The remaining steps; the wait for their data is counted."""
        stream = self.learner.batches(self.step * self.config.train.batch_size)
        for _ in range(self.steps - self.step):
            asked = time.perf_counter()
            micro_batches = list(islice(stream, self.config.train.accumulate))
            first, start, waited = self.since
            self.since = first, start, waited + time.perf_counter() - asked
            yield micro_batches

    @property
    def epoch(self) -> float:
        return self.step * self.config.train.batch_size / self.samples

    @property
    def rate(self) -> float:
        """Of the next step, before `lr_scale`."""
        optim, train = self.config.optim, self.config.train
        a_step = train.batch_size / self.samples  # in epochs
        return schedule_lr(
            optim.schedule,
            self.epoch,
            peak=scaled_lr(optim.base_lr, train.batch_size),
            floor=optim.min_lr,
            warmup=optim.warmup_steps * a_step or optim.warmup_epochs,
            epochs=train.steps * a_step or train.epochs,
            milestones=optim.milestones,
        )

    def _train(self, micro_batches: list[Any]) -> None:
        optim, optimizer, rate = self.config.optim, self.learner.optimizer, self.rate
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        # Stochastic depth draws from the global generator: keyed by step and rank, so that a resumed run repeats.
        seed_generators(self.config.seed, self.step, self.here.rank)
        self.module.train()
        for number, micro_batch in enumerate(micro_batches, 1):
            alone = self.here.world_size > 1 and number < len(micro_batches)
            with self.module.no_sync() if alone else contextlib.nullcontext():
                with self.precision.autocast(self.here.device):
                    losses_R = self.learner.losses(self.module, micro_batch)
                # Parts that share no weights: the gradient of the sum is each one's own.
                self.scaler.scale(losses_R.sum() / len(micro_batches)).backward()
            self.losses.append(losses_R.detach().min())
        if optim.clip_grad:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.learner.module.parameters(), optim.clip_grad)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            update_ema_(self.ema, self.learner.module, optim.ema)
        self.step += 1

    def _log(self) -> None:
        """The only place in the loop that waits for the device; asks whether somebody wants an end."""
        if self.step % self.config.run.log_every and self.step != self.steps:
            return
        loss = float(mean_over_ranks(torch.stack(self.losses).mean()))
        first, start, waited = self.since
        elapsed = max(time.perf_counter() - start, 1e-9)
        rate = (self.step - first) / elapsed
        figures = {
            "epoch": self.epoch,
            "loss": loss,
            "lr": max(group["lr"] for group in self.learner.optimizer.param_groups),
            "images_per_second": rate * self.config.train.batch_size,
            "data_wait": waited / elapsed,
            "eta_seconds": (self.steps - self.step) / max(rate, 1e-9),
        }
        self.losses, self.since = [], (self.step, time.perf_counter(), 0.0)
        if self.metrics is not None:
            self.metrics.write("train", self.step, **figures)
        self.progress.update(self.step, figures)
        if not np.isfinite(loss):
            raise NumericsError(
                f"step {self.step}: the loss is not finite; lower optim.base_lr, or train.precision=fp32"
            )
        stop = max_over_ranks(torch.tensor(float(bool(self.signals.name)), device=self.here.device))
        if stop.item() and self.step < self.steps:
            self._write()
            raise StoppedError(f"stopped after step {self.step}, all saved; go on with --run.resume=auto")

    def _finished_epoch(self) -> int:
        """The number of the epoch that the last step ended, or that the run ends in; else 0."""
        before = (self.step - 1) * self.config.train.batch_size // self.samples
        ended = self.step * self.config.train.batch_size // self.samples
        return max(ended, 1) if self.step == self.steps else ended if ended > before else 0

    def _tell(self, figures: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.write("test", self.step, epoch=self.epoch, **figures)
        words = ", ".join(f"{name} {value:.2%}" for name, value in figures.items())
        self.progress.note(f"step {self.step}: {words}")

    @torch.no_grad()
    def test(self) -> dict[str, float]:
        """The figures of this moment, and those of the averaged weights."""
        self.module.eval()
        if dist.is_initialized():
            # BatchNorm's statistics are each rank's own; those that are saved count.
            for buffer in self.learner.module.buffers():
                dist.broadcast(buffer, 0)
        with self.precision.autocast(self.here.device):
            figures = self.learner.test()
        if self.ema is None:
            return figures
        # A context of its own: autocast keeps what it has cast, and would find weights of the same memory there.
        with averaged_in(self.learner.module, self.ema), self.precision.autocast(self.here.device):
            return figures | {f"{name}, averaged weights": value for name, value in self.learner.test().items()}

    def _save(self, epoch: int) -> None:
        if epoch % self.config.run.save_every == 0 or self.step == self.steps:
            self._write()

    def _write(self) -> None:
        if self.here.is_main:
            state = {
                "model": self.learner.module.state_dict(),
                "optimizer": self.learner.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ema": None if self.ema is None else self.ema.state_dict(),
                "step": self.step,
                "encoder": self.encoder,
                "config": to_yaml(self.config),
                "settings": {key: str(value) for key, value in flatten(self.config).items()},
            }
            io.save(self.checkpoints, self.step, state, self.config.run.keep)
        barrier()

    def _resume(self) -> int:
        """Load the newest checkpoint that the first rank can; returns its step, 0 where there is none.

        Raises:
            ConfigError: a setting, or the encoder it began with, is not that of the checkpoint.
            CheckpointError: it is of something else.
        """
        path = broadcast(io.newest(self.checkpoints).path if self.here.is_main else None)
        if path is None:
            return 0
        state = io.load(path)
        try:
            self._check_settings(state["settings"])
            if state["encoder"] != self.encoder:
                raise ConfigError(f"{path}: began with another encoder; choose another run.dir, or --overwrite")
            self.learner.module.load_state_dict(state["model"])
            self.learner.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            return state["step"]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: is of another evaluation: {' '.join(str(error).split())[:200]}") from None

    def _check_settings(self, before: dict[str, Any]) -> None:
        for key, value in flatten(self.config).items():
            if not key.startswith(_FREE) and before[key] != str(value):
                raise ConfigError(f"{key}={value}: the checkpoint has {before[key]}; use that, or --overwrite")


def fingerprint(weights: Weights) -> str:
    """Of an encoder's tensors, wherever they lie; of initial weights, the name of their architecture."""
    if weights.tensors is None:
        return weights.name
    found = hashlib.sha256()
    for name, tensor in sorted(weights.tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def seed_generators(*key: int) -> None:
    """Set the global generators of `random`, NumPy and torch, which timm draws from, by a key of whole numbers."""
    high, low = (int(word) for word in np.random.SeedSequence(key).generate_state(2))
    random.seed(high << 32 | low)
    torch.manual_seed(high << 32 | low)
    np.random.seed(high)  # noqa: NPY002  (timm's)
