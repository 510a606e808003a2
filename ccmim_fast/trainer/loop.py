"""The run: for each batch, step, log; for each epoch, save and look."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.state import Progress, capture, maps_in, restore
from ccmim_fast.config.schema import Config
from ccmim_fast.config.validate import validate
from ccmim_fast.data.batch import Batch
from ccmim_fast.data.loader import build_loader, build_source
from ccmim_fast.optim.schedule import lr_at, scaled_lr
from ccmim_fast.trainer.build import build_bank, build_step, check_device, choose_shards, prepare_step
from ccmim_fast.trainer.data_report import DataReport
from ccmim_fast.trainer.distributed import Session, main_first, max_over_ranks, mean_over_ranks, session
from ccmim_fast.trainer.find_batch import with_largest_batch
from ccmim_fast.trainer.metrics import Metrics, ProgressLine
from ccmim_fast.trainer.profile import Profile, check_room
from ccmim_fast.trainer.run_folder import describe_run, open_run_folder
from ccmim_fast.trainer.run_state import recorded
from ccmim_fast.trainer.step import StepResult
from ccmim_fast.trainer.throughput import Meter

# Called on the first rank after an epoch (and once before the first, as epoch 0) with the number of the epoch and the
# run, whose model is in eval mode.
AfterEpoch = Callable[[int, "Trainer"], None]


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
            with recorded(trainer.folder, here.is_main, lambda: trainer.step >= trainer.total_steps):
                trainer.run()
        finally:
            trainer.close()
    return Path(config.run.dir)


class Trainer:
    """Everything a run owns. Built in the order in which a mistake is cheapest to find: folder, images, model."""

    def __init__(self, config: Config, here: Session, after_epoch: AfterEpoch | None = None):
        self.config, self.here, self.after_epoch = config, here, after_epoch
        self.folder = open_run_folder(config) if here.is_main else Path(config.run.dir)
        with main_first(here):  # that indexes the images, if nobody has
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
            shards=choose_shards(config),
        )
        self.bank = build_bank(config, self.loader.plan, here, self.folder)
        self.lr = scaled_lr(config.optim.base_lr, config.train.batch_size)
        self.train_step = build_step(config, here)
        self.model = self.train_step.model
        micro_batch = config.train.batch_size // (config.train.accumulate * here.world_size)
        self.step_fn = prepare_step(self.train_step, micro_batch)
        self.samples = self.loader.plan.samples
        self.step, self.seen = self._resume()
        self.total_steps = self._total_steps()
        check_room(config.train.profile, left=self.total_steps - self.step)
        self.nan_id = torch.full((), -1, device=here.device)
        self.meter = Meter(config.train.batch_size, here, self.train_step)
        self.metrics = None
        if here.is_main:
            describe_run(self.folder, config, here.device)
            self.metrics = Metrics(self.folder, tensorboard=config.run.tensorboard, resume_step=self.step)
        log = self.folder / "log.txt"
        self.progress = ProgressLine(self._headline(), self.total_steps, self.step, here.is_main, log)
        # Every rank reads images of its own, and tells of those that failed.
        note = self.progress.note if here.is_main else functools.partial(print, f"rank {here.rank}:", flush=True)
        self.data_report = DataReport(self.loader, config.data.image_size, note, self.metrics)
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

    def run(self) -> None:
        if self.step == 0:
            self._look(0)
        with closing(self.loader.stream(self.seen)) as stream:
            for batches in self.profile.watch(self._steps(stream)):
                result = self._train(batches)
                self._log(result)
                epoch = self._finished_epoch()
                if epoch:
                    self._save(epoch)
                    self._look(epoch)
        self.data_report.close()

    def close(self) -> None:
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()

    def _headline(self) -> str:
        """What the run works on and with, `auto` resolved, and what it leaves out."""
        parts = [
            f"{self.samples} images",
            f"{type(self.loader).__name__}",
            f"{self.here.world_size} x {self.here.device}, {self.train_step.precision.name}",
            f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M parameters",
        ]
        if len(self.source.excluded_X):
            first = self.source.name(int(self.source.excluded_X[0]))
            parts.insert(1, f"{len(self.source.excluded_X)} of {len(self.source)} left out, the first {first!r}")
        return " · ".join(parts)

    def _total_steps(self) -> int:
        """Of the whole run: until every sample was seen in every epoch. The last step may see some once more."""
        left = self.config.train.epochs * self.samples - self.seen
        whole = self.step + max(0, -(-left // self.config.train.batch_size))
        return min(whole, self.config.train.max_steps) if self.config.train.max_steps else whole

    def _steps(self, stream: Iterator[Batch]) -> Iterator[list[Batch]]:
        """The remaining steps, each a list of micro-batches; the wait for data is metered."""
        grouped = _groups(stream, self.config.train.accumulate)
        return self.meter.waiting(islice(grouped, self.total_steps - self.step))

    def _finished_epoch(self) -> int:
        """The number of the epoch that the last step ended, counted from 1, or that the run ends in; else 0."""
        epochs = self.seen // self.samples
        if self.step == self.total_steps:
            return min(-(-self.seen // self.samples), self.config.train.epochs)
        return epochs if epochs > (self.seen - self.config.train.batch_size) // self.samples else 0

    def _train(self, batches: list[Batch]) -> StepResult:
        if self.config.model.drop_path > 0:
            # Stochastic depth draws from the global generator: keyed by step and rank, so that a resumed run repeats.
            torch.manual_seed((self.config.seed << 40) + self.step * self.here.world_size + self.here.rank)
        lr = lr_at(
            self.seen / self.samples,
            peak=self.lr,
            floor=self.config.optim.min_lr,
            warmup=self.config.optim.warmup_epochs,
            epochs=self.config.train.epochs,
        )
        if self.bank is not None:
            batches = self.bank.lend(self.seen, batches)
        result = self.step_fn(batches, lr)
        if self.bank is not None:
            self.bank.take_back(result.maps)
        self.meter.stepped()
        self.step += 1
        self.seen += self.config.train.batch_size
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
            "epoch": self.seen / self.samples,
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
        self.data_report.update(self.step, figures["data_wait"])

    def _report_nan(self, sample: int) -> None:
        """Since the last logged step some patch of `sample` had a NaN score, or none had (-1)."""
        if sample < 0:
            return
        self.nan_id.fill_(-1)
        if self.metrics is not None:
            self.metrics.write("nan_scores", self.step, sample=sample)
        self.progress.note(f"step {self.step}: NaN scores, of sample {sample} among others; they count as the largest")

    def _save(self, epoch: int) -> None:
        if self.step < self.total_steps and epoch % self.config.run.save_every:
            return
        maps_NGG = None if self.bank is None else self.bank.contents()
        if self.here.is_main:
            now, shards = self.train_step, self.loader.plan.shards
            progress = Progress(self.step, self.seen, self.samples, self.source.fingerprint, shards)
            state = capture(now.model, now.optimizer, now.scaler, now.ema, progress, self.config, maps_NGG)
            io.save(self.folder / "checkpoints", self.step, state, keep=self.config.run.keep)

    def _look(self, epoch: int) -> None:
        if self.after_epoch is not None and self.here.is_main:
            self.model.eval()
            self.after_epoch(epoch, self)
            self.model.train()
        self.meter.pause()

    def _resume(self) -> tuple[int, int]:
        """Optimizer steps taken, and samples seen."""
        resume = self.config.run.resume
        if resume == "never":
            return 0, 0
        if resume == "auto":
            found = io.newest(self.folder / "checkpoints")
            for problem in found.problems:
                print(problem, flush=True)
            state = found.state
        else:
            state = io.load(Path(resume))
        if state is None:
            return 0, 0
        now = self.train_step
        progress = restore(state, now.model, now.optimizer, now.scaler, now.ema)
        for problem in self._changes(progress):
            if self.here.is_main:
                print(problem, flush=True)
        maps_NGG = None if self.bank is None else maps_in(state, self.config.score.grid)
        if maps_NGG is not None and progress.images == self.source.fingerprint:
            self.bank.fill(maps_NGG)
        return progress.step, progress.seen

    def _changes(self, progress: Progress) -> Iterator[str]:
        """What makes the stream of samples another one than that of the checkpoint."""
        shards = self.loader.plan.shards
        if progress.images != self.source.fingerprint:
            what = f"the images are not those of the checkpoint ({progress.samples} then, {self.samples} now)"
        elif progress.shards != shards:
            what = f"score.shards={shards} is not the checkpoint's {progress.shards}"
        else:
            return
        yield f"{what}: this epoch goes on in another order, in which some may come twice and some not at all"


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    batches = iter(batches)
    while group := list(islice(batches, size)):
        yield group
