"""The one loop of everything that trains: for each batch step, log, check; for each epoch save and evaluate."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.schema import Config
from ccmim_fast.data.stream.batch import in_groups
from ccmim_fast.engine.checkpointer import Checkpointer
from ccmim_fast.engine.health import DataReport, Spikes
from ccmim_fast.engine.step_monitor import StepMonitor, StepStatus
from ccmim_fast.engine.task import Result, Task
from ccmim_fast.errors import NumericsError, StoppedError
from ccmim_fast.profile.meter import Meter
from ccmim_fast.ranks.session import Session
from ccmim_fast.ranks.signals import StopSignals
from ccmim_fast.runs.folder import RunFolder
from ccmim_fast.runs.metrics import Metrics, ProgressLine

Steps = Iterable[list[Any]]  # the micro-batches of each step


class Loop:
    """One run of a task, resumed where `run.resume` says. Every rank has one; `close` ends its lines and records.

    `step` and `seen` are the optimizer steps taken, and the samples that they showed over all ranks; `folder`, the
    run's, is open, and begins once the checkpoint is loaded and nothing is left to be refused.
    """

    def __init__(self, task: Task, config: Config | EvalConfig, here: Session, folder: RunFolder):
        self.task, self.config, self.here = task, config, here
        self.samples = task.loader.plan.samples  # of an epoch
        self.checkpointer = Checkpointer(config, here, folder.path, task, self.note)
        self.step, self.seen = self.checkpointer.resume()
        self.total_steps = self._count_steps()
        task.check(self.total_steps - self.step)
        self.monitor, self.spikes = StepMonitor(here), Spikes(config.watch.spike)
        self.signals = StopSignals(keep_after_error=here.world_size > 1)
        self.meter = Meter(config.train.batch_size, here, task.count_flops(), task.precision.dtype)
        self.metrics = None
        folder.begin(config, here.device, lambda: self.step >= self.total_steps)
        if here.is_main:
            self.metrics = Metrics(folder.path, tensorboard=config.run.tensorboard, resume_step=self.step)
        log = folder.path / "log.txt"
        self.progress = ProgressLine(task.headline, self.total_steps, self.step, here.is_main, log)
        # Every rank reads images of its own, and tells of those that failed.
        note = self.progress.note if here.is_main else functools.partial(print, f"rank {here.rank}:", flush=True)
        self.data_report = DataReport(task.loader, config.data.image_size, note, self.metrics)

    def run(self, observe: Callable[[Steps], Steps] = iter) -> None:
        """Train to the end; `observe` passes the steps on as they are, and may measure what happens meanwhile.

        Raises:
            StoppedError: a signal asked for it; everything is saved.
            NumericsError: gradients stay not finite, and there is no checkpoint to go back to.
        """
        if self.step == 0:
            self._look(0)
            self._evaluate(0)
        saver = self.checkpointer.saver
        with self.signals, self.here.watchdog, saver, closing(self.task.loader.stream(self.seen)) as stream:
            for batches in observe(self._steps(stream)):
                result = self._train(batches)
                self._log(result, batches)
                if epoch := self._finished_epoch():
                    self._look(epoch)
                self._check(result, batches)
                if epoch:
                    self._save(epoch)
                    self._evaluate(epoch)
        self.data_report.close()

    def close(self) -> None:
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()

    def report(self, kind: str, message: str, **figures: Any) -> None:
        """Record an event in metrics.jsonl, and print a line that stays."""
        if self.metrics is not None:
            self.metrics.write(kind, self.step, **figures)
        self.note(f"step {self.step}: {message}")

    def note(self, line: str) -> None:
        """Print a line that stays."""
        self.progress.note(line)

    def _count_steps(self) -> int:
        """Return the steps until every sample was seen in every epoch. The last one may see some once more."""
        left, most = self.task.length - self.seen, self.config.train.max_steps
        whole = self.step + max(0, -(-left // self.config.train.batch_size))
        return max(self.step, min(whole, most)) if most else whole

    def _steps(self, stream: Iterator[Any]) -> Iterator[list[Any]]:
        """The remaining steps, each a list of micro-batches; the wait for data is metered."""
        grouped = islice(in_groups(stream, self.config.train.accumulate), self.total_steps - self.step)
        prepared = (self.task.prepare(batches, self.seen) for batches in grouped)
        return self.meter.steps(prepared, self.step + 1)

    def _finished_epoch(self) -> int:
        """Return the number of the epoch that the last step ended, counted from 1, or that the run ends in; else 0."""
        if self.step == self.total_steps:
            return -(-min(self.seen, self.task.length) // self.samples)
        ended = self.seen // self.samples
        return ended if ended > (self.seen - self.config.train.batch_size) // self.samples else 0

    def _train(self, batches: Sequence[Any]) -> Result:
        result = self.task.train(batches, self.step, self.seen)
        self.step += 1
        self.seen += self.config.train.batch_size
        return result

    def _log(self, result: Result, batches: Sequence[Any]) -> None:
        """The only place in the loop that reads from the device and waits for it."""
        if self.step % self.config.run.log_every and self.step != self.total_steps:
            return
        figures = {"epoch": self.seen / self.samples, **self.task.figures(result, batches, self.report)}
        figures |= self.meter.read(self.total_steps - self.step)
        if self.metrics is not None:
            self.metrics.write("train", self.step, **figures)
        self.progress.update(self.step, figures)
        if self.spikes.is_spike(loss := figures["loss"]):
            self.report("spike", f"the loss jumped to {loss:.4g}", loss=loss)
        self.data_report.update(self.step, figures["data_wait"])
        self.checkpointer.saver.poll()

    def _check(self, result: Result, batches: Sequence[Any]) -> None:
        """Act on what all ranks know of the last steps: go back after too many bad ones, stop where asked to."""
        evidence = self.task.evidence(result, batches)
        self.monitor.submit(self.step, result.gradients.bad, bool(self.signals.name), evidence)
        self._check_completed(wait=self.step == self.total_steps)

    def _check_completed(self, wait: bool) -> None:
        for status in self.monitor.completed(wait):
            if status.bad:
                self._skipped(status)
            if status.stop and self.step < self.total_steps:
                self.checkpointer.save(self.step, self.seen, self._for_good(self._finished_epoch()))
                self.checkpointer.close()
                by = self.signals.name or "a signal to another rank"
                raise StoppedError(f"stopped by {by} after step {self.step}, all saved; go on with --run.resume=auto")

    def _skipped(self, status: StepStatus) -> None:
        step, count = status.step, self.monitor.bad_in_a_row
        self.report("skipped_step", f"gradients of step {step} are not finite: it is skipped", at=step)
        if count < self.config.watch.bad_steps:
            return
        advice = self.task.capture(step, status.evidence)
        weights_of = self.checkpointer.go_back()
        words = f"{count} steps in a row with gradients that are not finite"
        if weights_of is None:
            raise NumericsError(f"step {step}: {words}, and no other checkpoint to go back to; {advice}")
        self.monitor.reset()
        words = f"{words}; goes on with the weights of step {weights_of}, past these samples; {advice}"
        self.report("went_back", words, to=weights_of)

    def _save(self, epoch: int) -> None:
        if not self._is_saved(epoch):
            return
        self._check_completed(wait=True)
        # What makes gradients bad may be in the weights: the checkpoint before is the one to go back to.
        if self.step == self.total_steps or not self.monitor.bad_in_a_row:
            self.checkpointer.save(self.step, self.seen, self._for_good(epoch))

    def _is_saved(self, epoch: int) -> bool:
        """Return if this epoch ends in a checkpoint, unless gradients are bad then."""
        return self._for_good(epoch) or self.step == self.total_steps or epoch % self.config.run.save_every == 0

    def _for_good(self, epoch: int) -> bool:
        """Return if the checkpoint of this epoch stays; that of an epoch within which the run ends does not."""
        every = self.config.run.keep_every
        return bool(every and epoch) and epoch % every == 0 and self.seen >= epoch * self.samples

    def _look(self, epoch: int) -> None:
        self.here.watchdog.enter_phase("measuring features")
        self.task.look(epoch, self._is_saved(epoch), self)

    def _evaluate(self, epoch: int) -> None:
        self.here.watchdog.enter_phase("evaluating the model")
        self.task.after_epoch(epoch, self)
        self.meter.pause()
