"""The run: for each batch, step, log; for each epoch, save and look."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch

from ccmim_fast.config.schema import Config
from ccmim_fast.config.validate import validate
from ccmim_fast.data.build import build_loader, build_source
from ccmim_fast.data.source import excluded_summary
from ccmim_fast.data.stream.batch import Batch, in_groups
from ccmim_fast.engine.build import build_bank, build_step, check_device, check_images, choose_shards, prepare_step
from ccmim_fast.engine.checkpointer import Checkpointer
from ccmim_fast.engine.data_report import DataReport
from ccmim_fast.engine.dry_run import count_flops
from ccmim_fast.engine.health import Spikes, health_of
from ccmim_fast.engine.memory import explains_out_of_memory, with_largest_batch
from ccmim_fast.engine.post_mortem import capture
from ccmim_fast.engine.step import StepResult
from ccmim_fast.engine.step_monitor import Past, StepMonitor
from ccmim_fast.errors import NumericsError, StoppedError
from ccmim_fast.optim.schedule import lr_at, scaled_lr
from ccmim_fast.profile.meter import Meter
from ccmim_fast.profile.profiler import Profile, check_room
from ccmim_fast.ranks.session import Session, main_first, max_over_ranks, mean_over_ranks, open_session
from ccmim_fast.ranks.signals import StopSignals
from ccmim_fast.runs.folder import describe_run, open_run_folder
from ccmim_fast.runs.metrics import Metrics, ProgressLine
from ccmim_fast.runs.state import recorded

# Called on the first rank after an epoch (and once before the first, as epoch 0) with the number of the epoch and the
# run, whose model is in eval mode.
AfterEpoch = Callable[[int, "Trainer"], None]
# Called on the first rank with each step that is logged: more figures for its record.
More = Callable[["Trainer", Sequence[Batch], StepResult], dict[str, float | None]]


@explains_out_of_memory
def fit(config: Config, after_epoch: AfterEpoch | None = None, more: More | None = None) -> Path:
    """Pretrain as `config` says; returns the run's folder.

    Raises:
        CcmimError: a user's error, with its exit code.
    """
    with open_session(config.train.device, config.watch.timeout) as here:
        validate(config, here.world_size)
        check_device(config, here, looks=after_epoch is not None)
        if config.train.find_batch:
            config = with_largest_batch(config, here)
        trainer = Trainer(config, here, after_epoch, more if here.is_main else None)
        try:
            with recorded(trainer.folder, here.is_main, lambda: trainer.step >= trainer.total_steps):
                trainer.run()
        finally:
            trainer.close()
    return Path(config.run.dir)


class Trainer:
    """Everything a run owns. Built in the order in which a mistake is cheapest to find: folder, images, model."""

    def __init__(self, config: Config, here: Session, after_epoch: AfterEpoch | None = None, more: More | None = None):
        self.config, self.here, self.after_epoch, self.more = config, here, after_epoch, more
        self.folder = open_run_folder(config) if here.is_main else Path(config.run.dir)
        here.watchdog.start(self.folder)
        with main_first(here):  # that indexes the images, if nobody has
            self.source = build_source(config.data, config.seed)
        check_images(self.source, here)
        self.loader = build_loader(
            self.source,
            config.data,
            config.seed,
            global_batch=config.train.batch_size,
            accumulate=config.train.accumulate,
            rank=here.rank,
            world_size=here.world_size,
            device=here.device,
            partitions=choose_shards(config),
        )
        self.bank = build_bank(config, self.loader.plan, here, self.folder)
        self.lr = scaled_lr(config.optim.base_lr, config.train.batch_size)
        self.train_step = build_step(config, here)
        self.model = self.train_step.model
        micro_batch = config.train.batch_size // (config.train.accumulate * here.world_size)
        self.step_fn = prepare_step(self.train_step, micro_batch)
        self.samples = self.loader.plan.samples
        self.checkpointer = Checkpointer(
            config,
            here,
            self.folder,
            self.train_step,
            self.loader.plan,
            self.bank,
            lambda line: self.progress.note(line),
        )
        self.step, self.seen = self.checkpointer.resume()
        self.total_steps = self._total_steps()
        check_room(config.train.profile, left=self.total_steps - self.step)
        self.nan_id = torch.full((), -1, device=here.device)
        self.watch, self.spikes = StepMonitor(here), Spikes(config.watch.spike)
        self.signals = StopSignals(keep_after_error=here.world_size > 1)
        self.meter = Meter(config.train.batch_size, here, count_flops(self.train_step), self.train_step.precision.dtype)
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
        with self.signals, self.here.watchdog, self.checkpointer, closing(self.loader.stream(self.seen)) as stream:
            for batches in self.profile.watch(self._steps(stream)):
                result = self._train(batches)
                self._log(result, batches)
                self._heed(result, batches)
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
        with_what = f"{self.here.world_size} x {self.here.device}, {self.train_step.precision.name}"
        size = f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M parameters"
        loader = type(self.loader).__name__
        return " · ".join([f"{self.samples} images", *excluded_summary(self.source), loader, with_what, size])

    def _total_steps(self) -> int:
        """Of the whole run: until every sample was seen in every epoch. The last step may see some once more."""
        left = self.config.train.epochs * self.samples - self.seen
        whole = self.step + max(0, -(-left // self.config.train.batch_size))
        return max(self.step, min(whole, self.config.train.max_steps)) if self.config.train.max_steps else whole

    def _steps(self, stream: Iterator[Batch]) -> Iterator[list[Batch]]:
        """The remaining steps, each a list of micro-batches; the wait for data is metered."""
        grouped = in_groups(stream, self.config.train.accumulate)
        return self.meter.waiting(islice(grouped, self.total_steps - self.step))

    def _finished_epoch(self) -> int:
        """The number of the epoch that the last step ended, counted from 1, or that the run ends in; else 0."""
        epochs = self.seen // self.samples
        if self.step == self.total_steps:
            return min(-(-self.seen // self.samples), self.config.train.epochs)
        return epochs if epochs > (self.seen - self.config.train.batch_size) // self.samples else 0

    def _train(self, batches: list[Batch]) -> StepResult:
        self.here.watchdog.enter_phase("in step", self.step + 1)
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
            self.bank.take_back([seen.maps_BGG for seen in result.seen])
        self.meter.stepped()
        self.step += 1
        self.seen += self.config.train.batch_size
        # Kept on the device until a step is logged.
        self.nan_id = torch.maximum(self.nan_id, result.nan_id)
        return result

    def _log(self, result: StepResult, batches: Sequence[Batch]) -> None:
        """The only place in the loop that reads from the device and waits for it."""
        if self.step % self.config.run.log_every and self.step != self.total_steps:
            return
        means = mean_over_ranks(torch.stack([*result[:4], result.gradients.norm, *result.gradients.norms_P]))
        # Float64 holds sample ids up to 2**53; one copy from the device for all.
        nan_id = max_over_ranks(self.nan_id.clone()).double()
        loss, recons, contrast, entropy, norm, *norms, nan_id = torch.cat([means.double(), nan_id[None]]).tolist()
        figures = {
            "epoch": self.seen / self.samples,
            "loss": loss,
            "recons": recons,
            "contrast": contrast if self.config.contrast.loss != "none" else None,
            "entropy": entropy,
            "grad_norm": norm,
            **{f"grad_norm_{part}": value for part, value in zip(self.train_step.parts, norms)},
            **self._representations(result.seen[-1].h_BE),
            **(self.more(self, batches, result) if self.more else {}),
            "lr": float(self.train_step.optimizer.param_groups[0]["lr"]),
            **self.meter.read(self.total_steps - self.step),
        }
        if self.metrics is not None:
            self.metrics.write("train", self.step, **figures)
        self.progress.update(self.step, figures)
        self._report_nan(int(nan_id))
        if self.spikes.is_spike(loss):
            self._tell("spike", loss=loss, words=f"the loss jumped to {loss:.4g}")
        self.data_report.update(self.step, figures["data_wait"])
        self.checkpointer.poll()

    def _representations(self, h_BE: torch.Tensor | None) -> dict[str, float]:
        if h_BE is None:
            return {}
        std, rank, words = health_of(h_BE)
        if words:
            self._tell("collapse", h_std=std, h_rank=rank, words=words)
        return {"h_std": std, "h_rank": rank}

    def _tell(self, kind: str, words: str, **figures: float) -> None:
        """A line for whoever is watching, and a record."""
        if self.metrics is not None:
            self.metrics.write(kind, self.step, **figures)
        self.progress.note(f"step {self.step}: {words}")

    def _report_nan(self, sample: int) -> None:
        """Since the last logged step some patch of `sample` had a NaN score, or none had (-1)."""
        if sample < 0:
            return
        self.nan_id.fill_(-1)
        if self.metrics is not None:
            self.metrics.write("nan_scores", self.step, sample=sample)
        self.progress.note(f"step {self.step}: NaN scores, of sample {sample} among others; they count as the largest")

    def _heed(self, result: StepResult, batches: Sequence[Batch]) -> None:
        """Act on what all ranks know of the last steps: go back after too many bad ones, stop where asked to."""
        self.watch.saw(self.step, result, batches, stop=bool(self.signals.name))
        self._hear(everything=self.step == self.total_steps)

    def _hear(self, everything: bool) -> None:
        for past in self.watch.past(everything):
            if past.bad:
                self._skipped(past)
            if past.stop and self.step < self.total_steps:
                self.checkpointer.save(self.step, self.seen, self._for_good(self._finished_epoch()))
                self.checkpointer.close()
                by = self.signals.name or "a signal to another rank"
                raise StoppedError(f"stopped by {by} after step {self.step}, all saved; go on with --run.resume=auto")

    def _skipped(self, past: Past) -> None:
        self._tell("skipped_step", at=past.step, words=f"gradients of step {past.step} are not finite: it is skipped")
        if self.watch.bad_in_a_row < self.config.watch.bad_steps:
            return
        plan, size = self.loader.plan, self.config.data.image_size
        captured = capture(self.folder / "captures", past, self.model, plan, self.train_step.precision, size)
        weights_of = self.checkpointer.go_back()
        what = f"{self.watch.bad_in_a_row} steps in a row with gradients that are not finite"
        if weights_of is None:
            raise NumericsError(f"step {past.step}: {what}, and no other checkpoint to go back to; {captured}")
        self.watch.forget()
        words = f"{what}; goes on with the weights of step {weights_of}, past these samples; {captured}"
        self._tell("went_back", to=weights_of, words=words)

    def _save(self, epoch: int) -> None:
        for_good, last = self._for_good(epoch), self.step == self.total_steps
        if not (for_good or last or epoch % self.config.run.save_every == 0):
            return
        self._hear(everything=True)
        # What makes gradients bad may be in the weights: the checkpoint before is the one to go back to.
        if last or not self.watch.bad_in_a_row:
            self.checkpointer.save(self.step, self.seen, for_good)

    def _for_good(self, epoch: int) -> bool:
        """Whether the checkpoint of this epoch stays; a run may end within it, and that is not what is kept of it."""
        every = self.config.run.keep_every
        return bool(every and epoch) and epoch % every == 0 and self.seen >= epoch * self.samples

    def _look(self, epoch: int) -> None:
        self.here.watchdog.enter_phase("evaluating the model")
        if self.after_epoch is not None and self.here.is_main:
            self.model.eval()
            self.after_epoch(epoch, self)
            self.model.train()
        self.meter.pause()
