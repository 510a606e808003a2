"""Pretraining as a task of the loop: masked image modelling with its score bank, its figures and its evidence."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ccmim_fast.autotune.table import FILE as AUTOTUNE
from ccmim_fast.autotune.table import write_table
from ccmim_fast.bank.bank import ScoreBank
from ccmim_fast.checkpoints.state import Progress
from ccmim_fast.config.schema import Config
from ccmim_fast.config.validate import validate
from ccmim_fast.data.build import Loader, build_loader, build_source
from ccmim_fast.data.index.left_out import left_out_lines, told
from ccmim_fast.data.source import usable_count
from ccmim_fast.data.stats import pixel_notes
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.engine import choices
from ccmim_fast.engine.build import (
    build_bank,
    build_step,
    check_device,
    check_images,
    check_model,
    choose_shards,
    prepare_step,
)
from ccmim_fast.engine.compile import eager
from ccmim_fast.engine.dry_run import count_flops
from ccmim_fast.engine.health import health_of
from ccmim_fast.engine.look import Look
from ccmim_fast.engine.loop import Loop
from ccmim_fast.engine.memory import explains_out_of_memory, with_largest_batch
from ccmim_fast.engine.post_mortem import Evidence, write_capture
from ccmim_fast.engine.step import StepResult
from ccmim_fast.engine.task import Report, Task
from ccmim_fast.errors import CcmimError, CheckpointError, one_line, say
from ccmim_fast.optim.update import lr_at, scaled_lr
from ccmim_fast.profile.profiler import Profile, check_room
from ccmim_fast.ranks.session import Session, main_first, max_over_ranks, mean_over_ranks, open_session
from ccmim_fast.runs.folder import read_by, run_folder

# Called on the first rank after an epoch (and once before the first, as epoch 0) with the number of the epoch and the
# run, whose model is in eval mode.
AfterEpoch = Callable[[int, "Pretraining"], None]
# Called on the first rank with each step that is logged: more figures for its record.
More = Callable[["Pretraining", Sequence[Batch], StepResult], dict[str, float | None]]


@explains_out_of_memory
def fit(config: Config, after_epoch: AfterEpoch | None = None, more: More | None = None) -> Path:
    """Pretrain as `config` says; returns the run's folder. Raises CcmimError for a user's error."""
    with open_session(config.train.device, config.watch.timeout) as here:
        validate(config, here.world_size)
        check_device(config, here, looks=after_epoch is not None)
        check_model(config)
        if config.train.find_batch:
            config = with_largest_batch(config, here)
        # In the order in which a mistake is cheapest to find: sizes, folder, images, model, checkpoint.
        with run_folder(config.run, read_by(config.data), is_main=here.is_main) as folder:
            here.watchdog.start(folder.path)
            task = Pretraining(config, here, folder.path, after_epoch, more)
            with closing(Loop(task, config, here, folder)) as loop:
                if here.is_main:
                    write_table(folder.path / AUTOTUNE, task.chosen)
                    if notes := told(task.source):
                        records = [{"reason": n.reason, "count": n.count, "first": n.paths[0]} for n in notes]
                        loop.metrics.write("left_out", loop.step, notes=records)
                    for line in (*pixel_notes(task.source), *task.chosen.notes()):
                        loop.note(line)
                loop.run(_profile(task, loop).watch)
    return folder.path


def _profile(task: "Pretraining", loop: Loop) -> Profile:
    train, model, precision = task.config.train, task.model, task.precision
    images = train.batch_size // task.here.world_size
    options = {"images": images, "note": loop.note}
    return Profile(train.profile, task.here, task.folder, loop.meter, model, precision, **options)


class Pretraining(Task):
    """One run of pretraining on this rank; its methods are those of `Task`."""

    def __init__(
        self,
        config: Config,
        here: Session,
        folder: Path,
        after_epoch: AfterEpoch | None = None,
        more: More | None = None,
    ):
        self.config, self.here, self.folder = config, here, folder
        self._after_epoch, self._more = (after_epoch, more) if here.is_main else (None, None)
        with main_first(here):  # that indexes the images, if nobody has
            self.source = build_source(config.data, config.seed)
        for line in left_out_lines(self.source) if here.is_main else []:
            say(line)
        check_images(self.source, here)
        self.loader = self._build_loader(config.data.loader)
        self.bank: ScoreBank | None = build_bank(config, self.loader.plan, here, folder)
        self.train_step = step = build_step(config, here)  # its parts, uncompiled
        self.model, self.optimizer, self.scaler, self.ema = step.model, step.optimizer, step.scaler, step.ema
        self.precision = step.precision
        step.pixels = getattr(torch, str(self.source.dtype))
        self._samples = self.loader.plan.samples
        self.length = config.train.epochs * self._samples
        asked = min(self.length, config.train.max_steps * config.train.batch_size or self.length)
        images, resumed = self.loader.plan.micro_batch_size, choices.run_of(config.run)
        self.chosen = choices.choose(step, images, here, asked, self.source, resumed)  # what `auto` came to
        choices.apply(self.chosen, step)
        if loader := self.chosen.chosen().get("loader"):
            self.loader = self._build_loader(loader)
        self._step_fn = prepare_step(step, images, choices.to_compile(self.chosen, step, here, asked))
        self.chosen = choices.choose_form(self.chosen, step, images, here)
        self._look = Look(step, self.loader, here, config.train.feature_images)
        self._nan_id = torch.full((), -1, device=here.device)

    def _build_loader(self, name: str) -> Loader:
        config, here = self.config, self.here
        return build_loader(
            self.source,
            replace(config.data, loader=name),
            config.seed,
            global_batch=config.train.batch_size,
            accumulate=config.train.accumulate,
            rank=here.rank,
            world_size=here.world_size,
            device=here.device,
            partitions=choose_shards(config),
        )

    def count_flops(self) -> dict[Any, float]:
        # torch compiles nothing under a counter.
        with eager(self.train_step):
            return count_flops(self.train_step)

    @property
    def headline(self) -> str:
        """Say what the run works on and with, `auto` resolved."""
        images = [f"{self.loader.plan.samples} images", type(self.loader).__name__]
        device = f"{self.here.world_size} x {self.here.device}, {self.precision.name}"
        weights = sum(p.numel() for p in self.model.parameters())
        images += ["float32 pixels"] if self.train_step.pixels.is_floating_point else []
        return " · ".join([*images, device, f"{weights / 1e6:.1f} M parameters"])

    def prepare(self, batches: list[Batch], seen: int) -> list[Batch]:
        return batches if self.bank is None else self.bank.read(seen, batches)

    def train(self, batches: Sequence[Batch], step: int, seen: int) -> StepResult:
        config = self.config
        if config.model.drop_path > 0:
            # Stochastic depth draws from the global generator: keyed by step and rank, so that a resumed run repeats.
            torch.manual_seed((config.seed << 32 | step * self.here.world_size + self.here.rank) % 2**64)
        lr = lr_at(
            seen / self._samples,
            peak=scaled_lr(config.optim.base_lr, config.train.batch_size),
            floor=config.optim.min_lr,
            warmup=config.optim.warmup_epochs,
            epochs=config.train.epochs,
        )
        result = self._step_fn(batches, lr)
        if self.bank is not None:
            self.bank.write([seen.maps_BGG for seen in result.seen])
        # Kept on the device until a step is logged.
        self._nan_id = torch.maximum(self._nan_id, result.nan_id)
        return result

    def figures(self, result: StepResult, batches: Sequence[Batch], report: Report) -> dict[str, float | None]:
        means = mean_over_ranks(torch.stack([*result[:4], result.gradients.norm, *result.gradients.norms_P]))
        # Float64 holds sample ids up to 2**53; one copy from the device for all.
        nan_id = max_over_ranks(self._nan_id.clone()).double()
        loss, recons, contrast, entropy, norm, *norms, nan_id = torch.cat([means.double(), nan_id[None]]).tolist()
        if nan_id >= 0:
            self._nan_id.fill_(-1)
            words = f"NaN scores, of sample {int(nan_id)} among others; they count as the largest"
            report("nan_scores", words, sample=int(nan_id))
        h_BE = result.seen[-1].h_BE
        return {
            "loss": loss,
            "recons": recons,
            "contrast": contrast if self.config.contrast.loss != "none" else None,
            "entropy": entropy,
            "grad_norm": norm,
            **{f"grad_norm_{part}": value for part, value in zip(self.train_step.parts, norms)},
            **({} if h_BE is None else health_of(h_BE, report)),
            **(self._more(self, batches, result) if self._more else {}),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
        }

    def look(self, epoch: int, saved: bool, loop: Loop) -> None:
        if self._look.is_due(epoch, saved):
            figures = self._look()
            words = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
            message = f"features of {self._look.images} images: {words}"
            loop.report("features", message, epoch=loop.seen / loop.samples, images=self._look.images, **figures)

    def after_epoch(self, epoch: int, loop: Loop) -> None:
        if self._after_epoch is not None:
            self.model.eval()
            self._after_epoch(epoch, self)
            self.model.train()

    def check(self, steps_left: int) -> None:
        check_room(self.config.train.profile, left=steps_left)

    def state(self) -> dict[str, Any]:
        return {"maps": None if self.bank is None else self.bank.contents()}

    def restore(self, state: dict[str, Any], progress: Progress) -> None:
        maps_NGG, cells = state.get("maps"), self.config.score.grid
        if self.bank is None or maps_NGG is None:
            return
        if not isinstance(maps_NGG, torch.Tensor) or maps_NGG.ndim != 3 or not maps_NGG.is_floating_point():
            raise CheckpointError("the checkpoint's score maps are none; start anew with --overwrite")
        if tuple(maps_NGG.shape[1:]) != (cells, cells):
            raise CheckpointError(f"score.grid={cells}: the checkpoint's maps have {maps_NGG.shape[1]}; use that")
        if progress.images == self.source.fingerprint:  # maps are those of the images
            if len(maps_NGG) != (count := usable_count(self.source)):
                raise CheckpointError(f"the checkpoint has score maps of {len(maps_NGG)} images, not of {count}")
            self.bank.fill(maps_NGG)
        elif self.here.is_main:
            say("score.source=bank: the score maps begin anew, as those of the checkpoint are of other images")

    def evidence(self, result: StepResult, batches: Sequence[Batch]) -> Evidence:
        # A captured step writes its masks into the same memory again.
        masks = [seen.mask_BL.clone() for seen in result.seen]
        return Evidence([batch.host_ids_B for batch in batches], [batch.epochs_B for batch in batches], masks)

    def capture(self, step: int, evidence: Evidence) -> str:
        folder, plan, size = self.folder / "captures", self.loader.plan, self.config.data.image_size
        try:
            return f"see {write_capture(folder, step, evidence, self.model, plan, self.precision, size)}"
        except (OSError, RuntimeError, CcmimError) as error:  # such as: a full disk, an image that is gone
            return f"no capture: {one_line(error, None)}"
