"""The checkpoints of a run: written from its parts while it goes on, and read back into them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ccmim_fast.checkpoints import distributed, io
from ccmim_fast.checkpoints.background import BackgroundSaver, CollectiveWriter
from ccmim_fast.checkpoints.state import Progress, capture, patterns, restore
from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.keys import settings, show
from ccmim_fast.config.load import difference, from_yaml
from ccmim_fast.config.schema import Config
from ccmim_fast.engine.task import Task
from ccmim_fast.errors import CheckpointError, ConfigError, StoppedError, say
from ccmim_fast.ranks.fsdp import is_sharded, let_go
from ccmim_fast.ranks.session import Session, backend_timeout, barrier, broadcast
from ccmim_fast.runs.state import read_state

_SAVED = (0, StoppedError.exit_code)  # exit codes of runs that have saved their last step


class Checkpointer:
    """This class saves and loads a run. Every rank calls it; the first one writes, or all that share the weights do.

    Checkpoints are in `checkpoints/` of the run's folder, and are written by `saver`, a context of the whole run.
    """

    def __init__(
        self, config: Config | EvalConfig, here: Session, folder: Path, task: Task, note: Callable[[str], None]
    ):
        self._config, self._here, self._task, self._plan = config, here, task, task.loader.plan
        self.folder = folder / "checkpoints"
        self._collective = None
        if is_sharded(task.model):
            self._collective = CollectiveWriter(backend_timeout(config.watch.timeout))
        self.saver = BackgroundSaver(self.folder, config.run.keep, note, self._collective)
        self._gone_back_to: Path | None = None

    def save(self, step: int, seen: int, for_good: bool = False) -> None:
        """Save the run as it is after `step` optimizer steps and `seen` samples; see `BackgroundSaver.save`."""
        self._here.watchdog.enter_phase("saving")
        task, plan, own = self._task, self._plan, self._task.state()
        if self._here.is_main or self._collective is not None:
            progress = Progress(step, seen, plan.samples, plan.source.fingerprint, plan.partitions)
            state = capture(task.model, task.optimizer, task.scaler, task.ema, progress, self._config)
            self.saver.save(step, state | own, for_good)

    def close(self) -> None:
        """Wait until the last save is done, on every rank; raises CheckpointError if it failed."""
        try:
            self.saver.close()
        finally:
            # Who ends first has its launcher end the others.
            barrier()

    def resume(self) -> tuple[int, int]:
        """Go on where `run.resume` says; returns optimizer steps taken and samples seen, 0 of a new run.

        Raises CheckpointError where a named checkpoint is damaged or of another model, ConfigError where a setting
        is not that of the checkpoint, and `run.allow_change` is not set.
        """
        resume = self._config.run.resume
        self._here.watchdog.enter_phase("loading a checkpoint")
        if resume == "never":
            return 0, 0
        state = self._newest()[1] if resume == "auto" else self._load(Path(resume))
        if state is None:
            return 0, 0
        self._check_settings(state)
        progress = self._restore(state, in_place=False)
        self._here.watchdog.enter_phase("loading a checkpoint", progress.step)
        if self._here.is_main and (problem := self._other_stream(progress)):
            say(problem)
        # Every place where a step may begin is a multiple of the shards; another batch may have left one that is not.
        shards = self._plan.partitions
        return progress.step, -(-self._seen_now(progress) // shards) * shards

    def go_back(self) -> int | None:
        """Take everything but the place in the stream from the newest checkpoint: it goes on past what came since.

        Returns its step; None where there is no checkpoint, or the run went back to this one before.
        """
        self.saver.wait()
        let_go(self._task.model)
        path, state = self._newest()
        if state is None or path == self._gone_back_to:
            return None
        self._gone_back_to = path
        return self._restore(state, in_place=True).step

    def _newest(self) -> tuple[Path | None, dict[str, Any] | None]:
        """The newest checkpoint that the first rank can load, on every rank."""
        if not self._here.is_main:
            path = broadcast(None)
            return path, None if path is None else self._load(path)
        found = io.newest(self.folder, divided=self._collective is not None)
        if found.path is None:
            self._check_new(found.problems)
        for problem in found.problems:
            say(problem)
        broadcast(found.path)
        return found.path, found.state if found.path is None else self._own(found.path, found.state)

    def _check_new(self, problems: list[str]) -> None:
        """Raise CheckpointError where a run begins anew, as no checkpoint loads, though there are some or were."""
        state = read_state(self.folder.parent)
        if problems:
            raise CheckpointError(
                f"{self.folder}: none of its checkpoints loads: {'; '.join(problems)}; nothing is changed: "
                "go on from a copy with --run.resume PATH, or start anew with --overwrite"
            )
        if state is not None and state.exit_code in _SAVED:
            raise CheckpointError(
                f"{self.folder}: no checkpoint in it, though state.json says that the run was {state.state} with all "
                "saved; put them back, or start anew with --overwrite"
            )

    def _load(self, path: Path) -> dict[str, Any]:
        return self._own(path, io.load(path, divided=self._collective is not None))

    def _own(self, path: Path, state: dict[str, Any]) -> dict[str, Any]:
        """The state as this rank has it: of divided weights its own parts, whoever wrote them."""
        if self._collective is None:
            return state
        like = patterns(self._task.model, self._task.optimizer)
        if distributed.are_in(path):
            return distributed.unite(state, distributed.read(path, like))
        return distributed.spread(state, like)

    def _check_settings(self, state: dict[str, Any]) -> None:
        """Tell which settings changed since, one a line (fault 14); raise for those that may not, or not unasked."""
        known = settings(type(self._config))
        words = {"free": "", "asked": "needs --allow-change"}
        try:
            before = from_yaml(state["config"], "the checkpoint", type(self._config), lambda _: None)
        except (ConfigError, KeyError):  # of another version, with other settings: shapes will tell
            return
        found = difference(before, self._config)
        rows = [("changed since the checkpoint", "then", "now", "")]
        other = {key: f"another {'optimizer' if key.startswith('optim.') else 'model'}" for key in known}
        rows += [
            (k, show(a), show(b), words.get(known[k].on_resume, other[k]))
            for k, a, b in found
            if not k.startswith("run.")
        ]
        if self._here.is_main and len(rows) > 1:
            widths = [max(map(len, column)) for column in zip(*rows)]
            for row in rows:
                say("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        for key, then, now in found:
            if known[key].on_resume == "shape":
                raise CheckpointError(f"{key}={show(now)}: the checkpoint is of {other[key]}; use {show(then)}")
            if known[key].on_resume == "asked" and not self._config.run.allow_change:
                raise ConfigError(f"{key}={show(now)}: the checkpoint has {show(then)}; use that, or --allow-change")

    def _restore(self, state: dict[str, Any], in_place: bool) -> Progress:
        task = self._task
        progress = restore(state, task.model, task.optimizer, task.scaler, task.ema, in_place)
        task.restore(state, progress)
        return progress

    def _seen_now(self, progress: Progress) -> int:
        """Return the samples behind the run in the stream of the images that there are now.

        Of a set that grew or shrank it is the same number of epochs, and so the same place in a schedule of epochs.
        """
        if not progress.samples or not self._task.in_epochs:
            return progress.seen
        return progress.seen * self._plan.samples // progress.samples

    def _other_stream(self, progress: Progress) -> str:
        """Say what makes the stream of samples another one than that of the checkpoint; "": nothing."""
        plan = self._plan
        if not progress.seen:  # imported weights: no stream has begun
            return ""
        if progress.images != plan.source.fingerprint:
            what = f"the images are not those of the checkpoint ({progress.samples} then, {plan.samples} now)"
            if progress.samples != plan.samples and self._task.in_epochs:
                epoch, epochs = progress.seen / progress.samples, self._config.train.epochs
                what += f"; it goes on at epoch {epoch:.2f} of {epochs}, each of them has {plan.samples} images now"
        elif progress.shards != plan.partitions:
            what = f"score.shards={plan.partitions} is not the checkpoint's {progress.shards}"
        else:
            return ""
        return f"{what}: this epoch goes on in another order, in which some may come twice and some not at all"
