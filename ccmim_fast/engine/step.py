"""One optimizer step. Nothing here waits for the device: losses and norms come back as tensors."""

# B batch, L patches, E embedding dim, P parts of the model

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ccmim_fast.bank.bank import read_maps, update_maps
from ccmim_fast.config.schema import Config
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.losses.criteria import Losses, Objective
from ccmim_fast.models.ccmim import CCMIM, Output
from ccmim_fast.models.int8 import Int8Layers
from ccmim_fast.models.precision import Layers, Precision, cast_once, linear_layers
from ccmim_fast.models.scores import PriorScores
from ccmim_fast.optim.ema import update_ema_
from ccmim_fast.optim.update import Gradients, drop_gradients, guard, set_lr, update
from ccmim_fast.ranks.fsdp import is_sharded
from ccmim_fast.registry import SCORE_SOURCES


class Seen(NamedTuple):
    """The observations of a micro-batch beside its losses; on the device, without gradient."""

    nan_B: Tensor  # bool, images with NaN scores
    mask_BL: Tensor  # bool, masked patches
    entropy: Tensor  # of the scores' softmax as a share of log L, mean over images; NaN where nothing is scored
    h_BE: Tensor | None  # hV of Eq. 7 (for `align`: p(hV)), None without a contrastive loss
    maps_BGG: Tensor | None  # of a run with a score bank, the maps after the step, as `Batch.maps_BGG`
    logits_BL: Tensor | None  # log-scores up to a constant per row; None where nothing is scored


class StepResult(NamedTuple):
    """The results of a step on this rank; on the device, without gradient, scalars in float32."""

    # Means over the micro-batches; `contrast` is zero where the run has none.
    total: Tensor
    recons: Tensor
    contrast: Tensor
    entropy: Tensor
    gradients: Gradients  # of the global batch, before clipping; where they are `bad` the step changed no weight
    nan_id: Tensor  # int64, the largest id among the samples with a NaN score, -1 without any
    seen: tuple[Seen, ...]  # of each micro-batch


@dataclass(eq=False, repr=False)
class TrainStep:
    """Forward, backward, clip, update, average."""

    model: CCMIM  # bare; its weights are trained
    wrapped: nn.Module  # the model as it is called (DDP, or bare, which FSDP's is too)
    objective: Objective  # the losses of its output
    optimizer: torch.optim.Optimizer
    precision: Precision
    config: Config
    ema: AveragedModel | None = None  # averaged weights
    pixels: torch.dtype = torch.uint8  # of the images, which made ones have too

    def __post_init__(self) -> None:
        self._sharded = is_sharded(self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.scaled)
        self.parts = parts_of(self.model)  # the parameters of each part, by its name
        self._statistics = [buffer for name, buffer in self.model.named_buffers() if ".running_" in name]
        # Whose products a CPU's linear layers are, see `models.precision`; None: torch's, as compiling needs.
        self.linear: Layers | None = None if self.device.type != "cpu" or self.config.train.recompute else {}
        # What passes without gradient are computed in: `same`, or `int8`; `auto` is the same unless it was measured.
        self.teacher = "int8" if self.config.teacher.precision == "int8" else "same"
        # Blocks whose weights are cast once a step; compiled one by one, each call would cast them again.
        self.cast_blocks: list[nn.Module] = []
        self.forward = self.losses  # or its compiled self (`engine.compile`)

    @property
    def device(self) -> torch.device:
        return self.model.mean_C.device

    def __call__(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Train on the micro-batches of one step at the given learning rate."""
        set_lr(self.optimizer, lr)
        return self.run(batches)

    def run(self, batches: Sequence[Batch]) -> StepResult:
        """Take the step at the optimizer's present rate; all that it reads and writes is on the device."""
        before = [buffer.clone() for buffer in self._statistics]
        with cast_once(self.cast_blocks, self.precision.dtype), teacher_in(self.model, self.teacher):
            sums, nan_id, seen = self._passes(batches)
        gradients = self._update(before)
        return StepResult(*(sums / len(batches)), gradients, nan_id, tuple(seen))

    def _passes(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor, list[Seen]]:
        """Pass all micro-batches forward and backward; returns sums of their losses, `nan_id` and what was seen."""
        sums = torch.zeros(4, device=self.device)
        nan_id = torch.full((), -1, device=self.device)
        seen = []
        for index, batch in enumerate(batches):
            with self._gradients_summed_over_ranks(last=index == len(batches) - 1):
                losses, of_batch = self.forward(
                    batch.images_BHWC, batch.ids_B, batch.epochs_B, batch.boxes_B4, batch.maps_BGG
                )
                self.scaler.scale(losses.total / len(batches)).backward()
            contrast = torch.zeros_like(losses.total) if losses.contrast is None else losses.contrast
            sums += torch.stack([losses.total, losses.recons, contrast, of_batch.entropy]).detach()
            nan_id = torch.maximum(nan_id, torch.where(of_batch.nan_B, batch.ids_B, -1).max())
            seen.append(of_batch)
        return sums, nan_id, seen

    def losses(
        self,
        images_BHWC: Tensor,
        ids_B: Tensor,
        epochs_B: Tensor,
        boxes_B4: Tensor | None = None,
        maps_BGG: Tensor | None = None,
    ) -> tuple[Losses, Seen]:
        """Compute Eq. 10 of one micro-batch, and observe it."""
        model, momentum = self.model, self.config.score.momentum
        prior = None if maps_BGG is None else PriorScores(*read_maps(maps_BGG, boxes_B4, model.grid))
        # A cast weight that is kept gives the weight no gradient where a pass without gradients made it, as scores of
        # later blocks do (seen with torch 2.7.1), or FSDP let go of the weight meanwhile (seen with 2.15).
        cache = not (SCORE_SOURCES[self.config.score.source].runs_blocks or self._sharded)
        with self.precision.autocast(images_BHWC.device, cache), linear_layers(self.linear):
            output = self.wrapped(images_BHWC, ids_B, epochs_B, prior=prior)
        if maps_BGG is not None:
            scores_BL, scored_BL = output.cls_attention_BL, output.attended_BL
            maps_BGG = update_maps(maps_BGG, boxes_B4, scores_BL, model.grid, momentum, scored_BL)
        # Outside autocast: losses are float32 whatever the forward pass ran in.
        losses, partition = self.objective(output, images_BHWC), output.partition
        h_BE = None if output.visible_BE is None else output.visible_BE.detach()
        logits_BL = None if output.logits_BL is None else output.logits_BL.detach()
        return losses, Seen(partition.nan_B, partition.mask_BL, _entropy(output), h_BE, maps_BGG, logits_BL)

    def _gradients_summed_over_ranks(self, last: bool):
        """Gradients are reduced with the last micro-batch only, and weights that FSDP gathered are kept until then."""
        if self._sharded:
            self.model.set_requires_gradient_sync(last)
            self.model.set_reshard_after_backward(last)
        elif isinstance(self.wrapped, DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        return contextlib.nullcontext()

    def _update(self, before: list[Tensor]) -> Gradients:
        """Update weights and averages; a step without an update restores the statistics `before` it."""
        gradients = guard(self.optimizer, self.scaler, list(self.parts.values()), self.config.optim.clip_grad)
        update(self.optimizer, self.scaler, gradients.bad)
        drop_gradients(self.optimizer)
        for buffer, kept in zip(self._statistics, before):
            buffer.copy_(torch.where(gradients.norm.isfinite(), buffer, kept))
        if self.ema is not None:
            update_ema_(self.ema, self.model, self.config.optim.ema_decay)
        return gradients


@contextlib.contextmanager
def teacher_in(model: CCMIM, name: str) -> Iterator[None]:
    """Compute the model's passes without gradient in `same` or `int8` within, where the weights must not change."""
    model.without_gradient = Int8Layers() if name == "int8" else None
    try:
        yield
    finally:
        model.without_gradient = None


def parts_of(model: CCMIM) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters of encoder, decoder and heads, as far as there are any."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.partition(".")[0]
            parts.setdefault(part if part in ("encoder", "decoder") else "heads", []).append(parameter)
    return parts


def _entropy(output: Output) -> Tensor:
    """Compute `Seen.entropy`."""
    logits_BL = output.logits_BL
    if logits_BL is None:
        return torch.full((), torch.nan, device=output.pred_BMP.device)
    log_BL = logits_BL.detach().to(torch.float32).log_softmax(1)
    return -(log_BL.exp() * log_BL).sum(1).mean() / math.log(log_BL.shape[1])
