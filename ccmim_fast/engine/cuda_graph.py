"""The whole step as one CUDA graph: captured once, replayed with new images and learning rate."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.engine.step import StepResult, TrainStep
from ccmim_fast.optim.update import drop_gradients, set_lr


class GraphedStep:
    """A `TrainStep` whose device work is one graph launch. Called like the step it replays.

    Images and what belongs to them are copied into buffers of its own, so a loader may reuse its memory at once.
    Capture takes place at the first call, after the warm-up has created the optimizer's state and a checkpoint, if any,
    has filled it: a graph replays addresses.

    Args:
        step: with a `capturable` optimizer, on CUDA, one process.
    """

    def __init__(self, step: TrainStep):
        self.step = step
        self._batches: list[Batch] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: StepResult | None = None

    def __call__(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Train as `TrainStep.__call__`; the next call overwrites the result."""
        if self._graph is None:
            self._batches = [Batch(**{name: tensor.clone() for name, tensor in _read(b).items()}) for b in batches]
            self._capture()
        for static, batch in zip(self._batches, batches, strict=True):
            for name, tensor in _read(batch).items():
                getattr(static, name).copy_(tensor, non_blocking=True)
        set_lr(self.step.optimizer, lr)
        self._graph.replay()
        return self._result

    def _capture(self) -> None:
        """Record the step without running it."""
        drop_gradients(self.step.optimizer)
        torch.cuda.synchronize(self.step.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = self.step.run(self._batches)


def _read(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a batch that the step reads."""
    names = ("images_BHWC", "ids_B", "epochs_B", "boxes_B4", "maps_BGG")
    return {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
