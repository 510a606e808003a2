"""A loop trains a task: pretraining, or an evaluation that trains. A subclass of `Task` says how."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ccmim_fast.checkpoints.state import Progress
from ccmim_fast.data.build import Loader
from ccmim_fast.models.precision import Precision
from ccmim_fast.optim.update import Gradients

if TYPE_CHECKING:
    from ccmim_fast.engine.loop import Loop

# (kind, message, figures): a record in metrics.jsonl, and a line for whoever is watching.
Report = Callable[..., None]


class Result(Protocol):
    """A step returns this to the loop: its gradients, on the device. The task reads the rest."""

    gradients: Gradients


class Task:
    """A task has model, images and step of one run. A checkpoint holds model, optimizer, scaler and ema."""

    model: nn.Module  # not wrapped
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None  # averaged weights
    loader: Loader  # of the images to train on
    length: int  # samples of all epochs together
    in_epochs: bool = True  # the length is so many passes over the images, however many there are
    precision: Precision  # of the step's products
    headline: str  # one line on images and model, printed before the first step

    def prepare(self, batches: list[Any], seen: int) -> list[Any]:
        """Return the micro-batches of the step after `seen` samples as `train` takes them; it counts as waiting."""
        return batches

    def train(self, batches: Sequence[Any], step: int, seen: int) -> Result:
        """Take one optimizer step on its micro-batches, after `step` steps and `seen` samples."""
        raise NotImplementedError

    def figures(self, result: Result, batches: Sequence[Any], report: Report) -> dict[str, float | None]:
        """Return the figures of a step that is logged, `loss` and `lr` among them; every rank calls it.

        The one function of a task that may wait for the device. Events besides go to `report`.
        """
        raise NotImplementedError

    def count_flops(self) -> dict[Any, float]:
        """Return the FLOPs per image by operator, for MFU; empty where nobody counts them."""
        return {}

    def look(self, epoch: int, saved: bool, loop: "Loop") -> None:
        """Measure the model after an epoch and report it, before a checkpoint of its step exists; every rank calls it.

        `saved` says whether one will; a run that resumes at it has the record. Epoch 0 is the start.
        """

    def after_epoch(self, epoch: int, loop: "Loop") -> None:
        """Evaluate the model after an epoch, and before the first one as epoch 0; every rank calls it."""

    def check(self, steps_left: int) -> None:
        """Raise ConfigError where the steps that are left are too few for what the settings ask of them."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides model, optimizer, scaler and ema; every rank calls it."""
        return {}

    def restore(self, state: dict[str, Any], progress: Progress) -> None:
        """Take from a checkpoint what `state` put there."""

    def evidence(self, result: Result, batches: Sequence[Any]) -> Any:
        """Return what `capture` needs of a step; kept until all ranks know if its gradients were finite."""

    def capture(self, step: int, evidence: Any) -> str:
        """Write what explains a step whose gradients were not finite; returns a few words to the user."""
        return "lower optim.base_lr, or use train.precision=fp32"
