"""The run: for each batch, step, log; for each epoch, save and look."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.state import capture, restore
from ccmim_fast.config.schema import Config
from ccmim_fast.config.validate import validate
from ccmim_fast.data.batch import Batch
from ccmim_fast.data.loader import build_loader, build_source
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.optim.schedule import lr_at, scaled_lr
from ccmim_fast.trainer.build import build_step, check_device, prepare_step
from ccmim_fast.trainer.distributed import Session, max_over_ranks, mean_over_ranks, session
from ccmim_fast.trainer.find_batch import with_largest_batch
from ccmim_fast.trainer.metrics import Metrics, ProgressLine
from ccmim_fast.trainer.profile import Profile, check_room
from ccmim_fast.trainer.run_folder import describe_run, open_run_folder
from ccmim_fast.trainer.step import StepResult
from ccmim_fast.trainer.throughput import Meter

# Called after an epoch (and once before the first, as epoch 0) with the epoch number and the model in eval mode.
AfterEpoch = Callable[[int, CCMIM], None]


def fit(config: Config, after_epoch: AfterEpoch | None = None) -> Path:
    """Pretrain as `config` says; returns the run's folder.

    Raises:
        CcmimError: a user's error, with its exit code.
    """
    with session(config.train.device) as here:
        validate(config, here.world_size)
        check_device(config, here)
        if config.train.find_batch:
            config = with_largest_batch(config, here)
        trainer = Trainer(config, here, after_epoch)
        try:
            trainer.run()
        finally:
            trainer.close()
    return Path(config.run.dir)


class Trainer:
    """Everything a run owns. Built in the order in which a mistake is cheapest to find: folder, images, model."""

    def __init__(self, config: Config, here: Session, after_epoch: AfterEpoch | None = None):
        self.config, self.here, self.after_epoch = config, here, after_epoch
        self.folder = open_run_folder(config) if here.is_main else Path(config.run.dir)
        self.source = build_source(config.data, config.seed)
        self.loader = build_loader(
            self.source,
            config.data,
            config.seed,
            global_batch=config.train.batch_size,
            accumulate=config.train.accumulate,
            rank=here.rank,
            world_size=here.world_size,
            device=here.device,
        )
        self.lr = scaled_lr(config.optim.base_lr, config.train.batch_size)
        self.train_step = build_step(config, here)
        self.model = self.train_step.model
        micro_batch = config.train.batch_size // (config.train.accumulate * here.world_size)
        self.step_fn = prepare_step(self.train_step, micro_batch)
        self.step = self._resume()
        per_epoch = self.loader.steps_per_epoch
        check_room(config.train.profile, done=self.step, steps_per_epoch=per_epoch, total=self.total_steps)
        self.nan_id = torch.full((), -1, device=here.device)
        self.meter = Meter(config.train.batch_size, here, self.train_step)
        self.metrics = None
        if here.is_main:
            describe_run(self.folder, config, here.device)
            self.metrics = Metrics(self.folder, tensorboard=config.run.tensorboard, resume_step=self.step)
        self.progress = ProgressLine(self._headline(), self.total_steps, self.step, here.is_main)
        self.profile = Profile(
            config.train.profile,
            here,
            self.folder,
            self.meter,
            self.model,
            self.train_step.precision,
            images=config.train.batch_size // here.world_size,
            note=self.progress.note,
        )

    @property
    def total_steps(self) -> int:
        whole = self.config.train.epochs * self.loader.steps_per_epoch
        return min(whole, self.config.train.max_steps) if self.config.train.max_steps else whole

    def run(self) -> None:
        if self.step == 0:
            self._look(0)
        while self.step < self.total_steps:
            epoch, start = divmod(self.step, self.loader.steps_per_epoch)
            count = min(self.loader.steps_per_epoch - start, self.total_steps - self.step)
            for batches in self.profile.watch(self._steps(epoch, start), count):
                result = self._train(batches, epoch)
                self._log(result)
            self._save(epoch + 1)
            self._look(epoch + 1)

    def close(self) -> None:
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()

    def _headline(self) -> str:
        """What the run works on and with, `auto` resolved, and what it leaves out."""
        parts = [
            f"{len(self.source)} images",
            f"{type(self.loader).__name__}",
            f"{self.here.world_size} x {self.here.device}, {self.train_step.precision.name}",
            f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M parameters",
        ]
        skipped = getattr(self.source, "skipped", [])
        if skipped:
            path, reason = skipped[0]
            parts.insert(1, f"{len(skipped)} files skipped, the first {path!r}: {reason}")
        return " · ".join(parts)

    def _steps(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """The remaining steps of an epoch, each a list of micro-batches; the wait for data is metered."""
        wanted = self.total_steps - self.step
        grouped = _groups(self.loader.epoch(epoch, start_step=start), self.config.train.accumulate)
        return self.meter.waiting(islice(grouped, wanted))

    def _train(self, batches: list[Batch], epoch: int) -> StepResult:
        if self.config.model.drop_path > 0:
            # Stochastic depth draws from the global generator: keyed by step and rank, so that a resumed run repeats.
            torch.manual_seed((self.config.seed << 40) + self.step * self.here.world_size + self.here.rank)
        lr = lr_at(
            self.step / self.loader.steps_per_epoch,
            peak=self.lr,
            floor=self.config.optim.min_lr,
            warmup=self.config.optim.warmup_epochs,
            epochs=self.config.train.epochs,
        )
        result = self.step_fn(batches, epoch, lr)
        self.meter.stepped()
        self.step += 1
        # Kept on the device until a step is logged.
        self.nan_id = torch.maximum(self.nan_id, result.nan_id)
        return result

    def _log(self, result: StepResult) -> None:
        """The only place in the loop that reads from the device."""
        if self.step % self.config.run.log_every and self.step != self.total_steps:
            return
        means = mean_over_ranks(torch.stack(result[:4]))
        # Float64 holds sample ids up to 2**53; one copy from the device for all.
        nan_id = max_over_ranks(self.nan_id.clone()).double()
        loss, recons, contrast, grad_norm, nan_id = torch.cat([means.double(), nan_id[None]]).tolist()
        figures = {
            "epoch": self.step / self.loader.steps_per_epoch,
            "loss": loss,
            "recons": recons,
            "contrast": contrast if self.config.contrast.loss != "none" else None,
            "grad_norm": grad_norm if self.config.optim.clip_grad else None,
            "lr": float(self.train_step.optimizer.param_groups[0]["lr"]),
            **self.meter.read(self.total_steps - self.step),
        }
        if self.metrics is not None:
            self.metrics.write("train", self.step, **figures)
        self.progress.update(self.step, figures)
        self._report_nan(int(nan_id))

    def _report_nan(self, sample: int) -> None:
        """Since the last logged step some patch of `sample` had a NaN score, or none had (-1)."""
        if sample < 0:
            return
        self.nan_id.fill_(-1)
        if self.metrics is not None:
            self.metrics.write("nan_scores", self.step, sample=sample)
        self.progress.note(f"step {self.step}: NaN scores, of sample {sample} among others; they count as the largest")

    def _save(self, epoch: int) -> None:
        finished = self.step >= self.total_steps
        if self.here.is_main and (finished or epoch % self.config.run.save_every == 0):
            now = self.train_step
            state = capture(now.model, now.optimizer, now.scaler, now.ema, self.step, self.config)
            io.save(self.folder / "checkpoints", self.step, state, keep=self.config.run.keep)

    def _look(self, epoch: int) -> None:
        if self.after_epoch is not None and self.here.is_main:
            self.model.eval()
            self.after_epoch(epoch, self.model)
            self.model.train()
        self.meter.pause()

    def _resume(self) -> int:
        resume = self.config.run.resume
        if resume == "never":
            return 0
        if resume == "auto":
            found = io.newest(self.folder / "checkpoints")
            for problem in found.problems:
                print(problem, flush=True)
            state = found.state
        else:
            state = io.load(Path(resume))
        if state is None:
            return 0
        now = self.train_step
        return restore(state, now.model, now.optimizer, now.scaler, now.ema)


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    batches = iter(batches)
    while group := list(islice(batches, size)):
        yield group
