"""One optimizer step. Nothing here waits for the device: losses and norms come back as tensors."""

# B batch

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ccmim_fast.bank.warp import read, update
from ccmim_fast.config.schema import Config
from ccmim_fast.data.batch import Batch
from ccmim_fast.losses.total import Losses, total_loss
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.linear import onednn_linear
from ccmim_fast.models.output import Known
from ccmim_fast.optim.clip import clip
from ccmim_fast.optim.ema import update_ema_
from ccmim_fast.optim.optimizer import set_lr
from ccmim_fast.trainer.precision import Precision


class StepResult(NamedTuple):
    """Means over the micro-batches of this rank: float32 scalars on the device, without gradient.

    `contrast` is zero where the run has none; `grad_norm` is before clipping, zero where nothing is clipped. `nan_id`,
    int64, is the largest id among this rank's samples with a NaN score, -1 without any. `maps`: of a run with a score
    bank, those of each micro-batch after the step, as `Batch.maps_BGG`.
    """

    total: Tensor
    recons: Tensor
    contrast: Tensor
    grad_norm: Tensor
    nan_id: Tensor
    maps: tuple[Tensor, ...] = ()


class TrainStep:
    """Forward, backward, clip, update, average.

    Args:
        model: the bare model, whose weights are trained.
        wrapped: the same model as it is called (DDP or bare).
        optimizer: over the model's parameters.
        precision: autocast and scaling.
        config: of the run.
        ema: averaged weights, or None.

    Attributes:
        forward: as `losses`; may be replaced by its compiled self (`trainer.compiled`).
        onednn: linear layers by oneDNN, see `models.linear`; not to be compiled.
    """

    def __init__(
        self,
        model: CCMIM,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        config: Config,
        ema: AveragedModel | None = None,
    ):
        self.model, self.wrapped, self.optimizer, self.precision = model, wrapped, optimizer, precision
        self.config, self.ema = config, ema
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision.scaled)
        self.onednn = config.fast.onednn_linear and self.device.type == "cpu" and not config.train.recompute
        self.forward = self.losses

    @property
    def device(self) -> torch.device:
        return self.model.mean_C.device

    def __call__(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Train on the micro-batches of one step at the given learning rate."""
        set_lr(self.optimizer, lr)
        return self.run(batches)

    def run(self, batches: Sequence[Batch]) -> StepResult:
        """The step at the optimizer's present rate; everything it reads and writes is on the device."""
        sums = torch.zeros(3, device=self.device)
        nan_id = torch.full((), -1, device=self.device)
        maps = []
        for index, batch in enumerate(batches):
            with self._gradients_summed_over_ranks(last=index == len(batches) - 1):
                losses, nan_B, maps_BGG = self.forward(
                    batch.images_BHWC, batch.ids_B, batch.epochs_B, batch.boxes_B4, batch.maps_BGG
                )
                self.scaler.scale(losses.total / len(batches)).backward()
            parts = [losses.total, losses.recons]
            if losses.contrast is not None:
                parts.append(losses.contrast)
            sums[: len(parts)] += torch.stack(parts).detach()
            nan_id = torch.maximum(nan_id, torch.where(nan_B, batch.ids_B, -1).max())
            if maps_BGG is not None:
                maps.append(maps_BGG)
        grad_norm = self._update()
        return StepResult(*(sums / len(batches)), grad_norm, nan_id, tuple(maps))

    def losses(
        self,
        images_BHWC: Tensor,
        ids_B: Tensor,
        epochs_B: Tensor,
        boxes_B4: Tensor | None = None,
        maps_BGG: Tensor | None = None,
    ) -> tuple[Losses, Tensor, Tensor | None]:
        """Eq. 10 of one micro-batch, which of its images had NaN scores [B] bool, and its maps after it, if any."""
        model, momentum = self.model, self.config.score.momentum
        known = None if maps_BGG is None else Known(*read(maps_BGG, boxes_B4, model.grid))
        with self.precision.autocast(images_BHWC.device), onednn_linear(self.onednn):
            output = self.wrapped(images_BHWC, ids_B, epochs_B, known=known)
        if maps_BGG is not None:
            maps_BGG = update(maps_BGG, boxes_B4, output.shares_BL, model.grid, momentum)
        # Outside autocast: losses are float32 whatever the forward pass ran in.
        return total_loss(model, output, images_BHWC, self.config), output.partition.nan_B, maps_BGG

    def _gradients_summed_over_ranks(self, last: bool):
        """DDP reduces gradients with the last micro-batch only."""
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        return contextlib.nullcontext()

    def _update(self) -> Tensor:
        grad_norm = torch.zeros((), device=self.device)
        if self.config.optim.clip_grad > 0:
            grad_norm = clip(self.optimizer, self.scaler, self.config.optim.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            update_ema_(self.ema, self.model, self.config.optim.ema_decay)
        return grad_norm
