"""Training with labels is a task of the loop: a subclass of `Supervised` for each evaluation, one for classifiers."""

# B batch, H height, W width, C classes, R losses of a micro-batch, or heads

import contextlib
import hashlib
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ccmim_fast.checkpoints.published import Weights
from ccmim_fast.checkpoints.state import Progress
from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.validate import check_warm_up
from ccmim_fast.data.build import Loader
from ccmim_fast.data.source import usable_count
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.engine.loop import Loop
from ccmim_fast.engine.task import Report, Task
from ccmim_fast.errors import ConfigError, DataError
from ccmim_fast.evaluation.job import Job
from ccmim_fast.models.precision import choose_precision
from ccmim_fast.optim.ema import averaged_in, build_ema, update_ema_
from ccmim_fast.optim.update import Gradients, drop_gradients, guard, lr_at, scaled_lr, set_lr, update
from ccmim_fast.ranks.session import gather_values, mean_over_ranks


class SupervisedResult(NamedTuple):
    """A step leaves its gradients on the device."""

    gradients: Gradients


class Supervised(Task):
    """A protocol that trains is run by this task; a subclass has `losses` and `test`.

    The weights of `model` are trained and saved, the groups of `optimizer` may have `lr_scale`, and the stream of
    `loader` has `train.accumulate` micro-batches a step, on the device.
    """

    def __init__(self, job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Loader):
        config, here = job.config, job.here
        self._check_warm_up(config, loader.plan.samples)
        self.job, self.config, self.here, self.loader = job, config, here, loader
        self.precision = choose_precision(config.train.precision, here.device)
        self.model, self.optimizer = model, optimizer
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=self.precision.scaled)
        self.ema = build_ema(self.model, config.optim.ema)
        self.wrapped = DistributedDataParallel(self.model) if here.world_size > 1 else self.model
        self.length = (config.train.steps * config.train.batch_size) or config.train.epochs * self.loader.plan.samples
        self.in_epochs = not config.train.steps
        self.headline = f"{job.train.words()} · {here.world_size} x {here.device}, {self.precision.name}"
        self._encoder, self._losses = fingerprint(job.weights), []
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._statistics = [buffer for name, buffer in self.model.named_buffers() if ".running_" in name]

    @staticmethod
    def _check_warm_up(config: EvalConfig, samples: int) -> None:
        """Refuse a warm-up that is longer than the run; each of the two counts in steps or in epochs."""
        optim, train = config.optim, config.train
        steps = train.steps or train.epochs * samples / train.batch_size
        if optim.warmup_steps:
            check_warm_up("optim.warmup_steps", optim.warmup_steps, math.ceil(steps))
        else:
            epochs = train.steps * train.batch_size / samples if train.steps else train.epochs
            check_warm_up("optim.warmup_epochs", optim.warmup_epochs, epochs)

    def losses(self, batch: Any) -> Tensor:
        """Return losses [R] float32 of parts that share no weights, or of one; calls `wrapped` once, under autocast."""
        raise NotImplementedError

    def test(self) -> dict[str, float]:
        """Return figures of `model` on the test images, the same on every rank; it is in eval mode, without gradient.

        Not of `wrapped`: ranks may have unequal numbers of batches.
        """
        raise NotImplementedError

    def run(self) -> dict[str, float]:
        """Train to the end, or go on with a run that was stopped; returns the figures of the end."""
        self.here.watchdog.start(self.job.folder.path)
        with contextlib.closing(Loop(self, self.config, self.here, self.job.folder)) as loop:
            loop.run()
            return self.report_test(loop)

    def train(self, batches: Sequence[Any], step: int, seen: int) -> SupervisedResult:
        set_lr(self.optimizer, self._rate(seen))
        # Stochastic depth draws from the global generator: keyed by step and rank, so that a resumed run repeats.
        seed_generators(self.config.seed, step, self.here.rank)
        self.wrapped.train()
        before = [buffer.clone() for buffer in self._statistics]
        for number, batch in enumerate(batches, 1):
            alone = self.here.world_size > 1 and number < len(batches)
            with self.wrapped.no_sync() if alone else contextlib.nullcontext():
                with self.precision.autocast(self.here.device):
                    losses_R = self.losses(batch)
                # Parts that share no weights: the gradient of the sum is each one's own.
                self.scaler.scale(losses_R.sum() / len(batches)).backward()
            self._losses.append(losses_R.detach().min())
        gradients = guard(self.optimizer, self.scaler, [self._trained], self.config.optim.clip_grad)
        update(self.optimizer, self.scaler, gradients.bad)
        drop_gradients(self.optimizer)
        for buffer, kept in zip(self._statistics, before):
            buffer.copy_(torch.where(gradients.norm.isfinite(), buffer, kept))
        if self.ema is not None:
            update_ema_(self.ema, self.model, self.config.optim.ema)
        return SupervisedResult(gradients)

    def _rate(self, seen: int) -> float:
        """Return the learning rate after `seen` samples, before `lr_scale`."""
        optim, train, samples = self.config.optim, self.config.train, self.loader.plan.samples
        a_step = train.batch_size / samples  # in epochs
        return lr_at(
            seen / samples,
            shape=optim.schedule,
            peak=scaled_lr(optim.base_lr, train.batch_size),
            floor=optim.min_lr,
            warmup=optim.warmup_steps * a_step or optim.warmup_epochs,
            epochs=train.steps * a_step or train.epochs,
            milestones=optim.milestones,
        )

    def figures(self, result: SupervisedResult, batches: Sequence[Any], report: Report) -> dict[str, float | None]:
        """See `Task`. The loss is the mean since the last step that was logged."""
        loss = float(mean_over_ranks(torch.stack(self._losses).mean()))
        self._losses = []
        return {"loss": loss, "lr": max(group["lr"] for group in self.optimizer.param_groups)}

    def after_epoch(self, epoch: int, loop: Loop) -> None:
        """See `Task`. The last test comes after the loop."""
        if epoch and epoch % self.config.run.test_every == 0 and loop.step < loop.total_steps:
            self.report_test(loop)

    @torch.no_grad()
    def report_test(self, loop: Loop) -> dict[str, float]:
        """Test the weights, and the averaged ones where there are some; record the figures of this moment."""
        self.wrapped.eval()
        if dist.is_initialized():
            # BatchNorm's statistics are each rank's own; those that are saved count.
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        with self.precision.autocast(self.here.device):
            figures = self.test()
        if self.ema is not None:
            # A context of its own: autocast keeps what it has cast, and would find weights of the same memory there.
            with averaged_in(self.model, self.ema), self.precision.autocast(self.here.device):
                figures |= {f"{name}, averaged weights": value for name, value in self.test().items()}
        words = ", ".join(f"{name} {value:.2%}" for name, value in figures.items())
        loop.report("test", words, epoch=loop.seen / loop.samples, **figures)
        return figures

    def state(self) -> dict[str, Any]:
        return {"encoder": self._encoder}

    def restore(self, state: dict[str, Any], progress: Progress) -> None:
        """See `Task`. Raises ConfigError for a run that began with another encoder."""
        if state.get("encoder") != self._encoder:
            raise ConfigError("the checkpoint began with another encoder; choose another run.dir, or --overwrite")


def fingerprint(weights: Weights) -> str:
    """Return a hash of an encoder's tensors, wherever they lie; of initial weights, the name of their architecture."""
    if not weights.tensors:
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


class Classifier(Supervised):
    """This run trains a classifier.

    Args:
        model: inputs -> logits [B, C], or [R, B, C] of heads that share no trained weights.
        inputs: images of a batch, uint8 [B, H, W, channels] or prepared, -> what `model` takes; no gradient in it.
        loader: its micro-batches are (images, targets), or a `Batch` with labels; targets are [B] or shares [B, C].
        heads: names of the R heads.
    """

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        inputs: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        loader: Loader,
        heads: tuple[str, ...] = ("accuracy",),
    ):
        super().__init__(job, model, optimizer, loader)
        self._inputs, self._heads = inputs, heads

    def losses(self, batch: Batch | tuple[Tensor, Tensor]) -> Tensor:
        images, targets = (batch.images_BHWC, batch.labels_B) if isinstance(batch, Batch) else batch
        logits_RBC = self._logits(self.wrapped, images)
        return torch.stack([F.cross_entropy(of_head.float(), targets) for of_head in logits_RBC])

    def test(self) -> dict[str, float]:
        """Return the share of images named right, of each head, and with five guesses where there are more classes."""
        images, here = self.job.test, self.here
        guesses = (1, 5) if images.classes > 5 else (1,)
        right, seen = torch.zeros(len(guesses), len(self._heads), device=here.device), 0
        for batch in self.job.batches(images, self.loader.plan.micro_batch_size):
            here.watchdog.enter_phase("evaluating the model")
            named = self._logits(self.model, batch.images_BHWC).topk(guesses[-1], dim=-1).indices
            hits = named == batch.labels_B[:, None]
            right += torch.stack([hits[..., :n].any(-1).sum(1) for n in guesses])
            seen += len(batch.labels_B)
        seen = sum(gather_values(seen))
        if dist.is_initialized():
            dist.all_reduce(right)
        names = [f"{head}{suffix}" for suffix in ("", ", five guesses")[: len(guesses)] for head in self._heads]
        if not seen:
            raise DataError(f"none of the {usable_count(images.source)} images to test on can be read any more")
        return dict(zip(names, (right / seen).flatten().tolist()))

    def state(self) -> dict[str, Any]:
        """See `Task`. With it `evaluation.classifier` builds the classifier without its images."""
        told = self.job.weights._replace(tensors={})._asdict()
        return super().state() | {"classifier": {"encoder": told, "classes": list(self.job.train.source.class_names)}}

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        logits = model(self._inputs(images))
        return logits if logits.ndim == 3 else logits[None]
