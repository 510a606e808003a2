"""Dry runs take steps that leave no trace: for warm-up, for counting arithmetic, for finding what fits."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.data.stream.batch import Batch, on_device
from ccmim_fast.engine.step import TrainStep
from ccmim_fast.models.block import attending_by
from ccmim_fast.optim.update import drop_gradients, own_part
from ccmim_fast.profile.meter import flop_counter


def synthetic_batch(step: TrainStep, batch: int) -> Batch:
    """Make `batch` random images of the run's size, laid out as a loader's; with empty maps for a bank."""
    data, device, cells = step.config.data, step.device, step.config.score.grid
    shape = (batch, *data.image_size, data.channels)
    images_BHWC = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).to(step.pixels)
    ids_B, whole_B4 = np.arange(batch), np.tile([0.0, 0.0, 1.0, 1.0], (batch, 1))
    made = on_device(images_BHWC, ids_B, np.zeros_like(ids_B), None, whole_B4, device)
    if not step.model.banked:
        return made
    maps_ABGG = torch.zeros(1, batch, cells, cells, dtype=torch.float16, device=device)  # of all micro-batches, as read
    return made._replace(maps_BGG=maps_ABGG[0])


@contextlib.contextmanager
def dry_run(step: TrainStep) -> Iterator[None]:
    """Undo what is done within: weights, optimizer, scaler, averages and random numbers, all in the same memory.

    Kept on the host meanwhile. A fresh optimizer's state stays, as zeros, which is what it begins with.
    """
    tensors = [*step.model.parameters(), *step.model.buffers(), *_of_optimizer(step)]
    if step.ema is not None:
        tensors += [*step.ema.parameters(), *step.ema.buffers()]
    tensors = [own_part(tensor) for tensor in tensors]
    saved = [(tensor, tensor.cpu().clone()) for tensor in tensors]
    fresh, scaler, cpu = not step.optimizer.state, step.scaler.state_dict(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(step.device) if step.device.type == "cuda" else None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)
            for tensor in _of_optimizer(step) if fresh else ():
                tensor.zero_()
        drop_gradients(step.optimizer)
        step.scaler.load_state_dict(scaler)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, step.device)


def count_flops(step: TrainStep) -> dict[Any, float]:
    """Count the FLOPs per image of an eager forward and backward pass, by operator, as torch's dispatcher sees them.

    The pass is over two images; the contrastive loss alone grows with the square of the batch: below 0.1 % of a step.
    Attention is torch's: its counter takes xformers' heads for tokens.
    """
    with dry_run(step), attending_by(step.model, "sdpa"), flop_counter() as counter:
        batch = synthetic_batch(step, 2)
        losses, *_ = step.losses(batch.images_BHWC, batch.ids_B, batch.epochs_B, batch.boxes_B4, batch.maps_BGG)
        losses.total.backward()
    return {op: count / 2 for op, count in counter.get_flop_counts()["Global"].items()}


def _of_optimizer(step: TrainStep) -> list[Tensor]:
    return [value for state in step.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
