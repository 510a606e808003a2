"""This file has the faster forms of a step: compiled, after a warm-up without a trace, and captured as a CUDA graph."""

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.engine.dry_run import dry_run, synthetic_batch
from ccmim_fast.engine.step import StepResult, TrainStep
from ccmim_fast.models.block import ViTBlock
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.precision import with_cast_weights
from ccmim_fast.optim.update import drop_gradients, set_lr
from ccmim_fast.ranks.fsdp import is_sharded


def choose_compile(name: str, device: torch.device, divided: bool = False) -> str:
    """Return `off`, `blocks` or `step`; `auto` is `step` on CUDA from compute capability 7.0 on, which inductor needs.

    Blocks whose weights are `divided` among ranks are gathered between them: there it is `blocks`. A run of one process
    then holds the compiled step against the eager one (`choices.choose_form`). On a CPU only a long run can win back
    the time that compiling takes, see `choices.to_compile`.
    """
    if name != "auto":
        return name
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    return ("blocks" if divided else "step") if able else "off"


def compile_step(step: TrainStep, what: str, mode: str = "default", backend: str = "inductor") -> None:
    """Make `step` run compiled, at its next call; eagerly, after one line, where there is no torch.compile.

    Args:
        what: `blocks`: each transformer block as one graph, shared by blocks of a width and a number of tokens; `step`:
            forward pass and losses as one graph, whose backward pass is compiled with it; `off`.
        mode, backend: of torch.compile; the mode is inductor's.
    """
    step.linear = step.linear if what == "off" else None
    options = {"backend": backend, **({"mode": mode} if backend == "inductor" else {})}
    try:
        if what == "blocks":
            # A graph for each of: visible, masked and decoder's tokens, first and later blocks, whole and query tokens.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
            compute = with_cast_weights(torch.compile(ViTBlock.compute, fullgraph=True, **options))
            blocks = vit_blocks(step.model)
            for block in blocks:
                block.compute = compute
            # FSDP gathers them in the type of the products, and lets go of them.
            step.cast_blocks = [] if is_sharded(step.model) else blocks
        elif what == "step":
            # DDP cuts the graph into buckets itself.
            step.forward = torch.compile(step.losses, fullgraph=step.wrapped is step.model, dynamic=False, **options)
    except Exception as error:  # such as: a Python that torch.compile does not know yet
        _give_up(step, error)


def vit_blocks(model: CCMIM) -> list[ViTBlock]:
    """Return the blocks of encoder and decoder that can be compiled."""
    return [block for block in (*model.encoder.blocks, *model.decoder.blocks) if isinstance(block, ViTBlock)]


def compiled_as(step: TrainStep) -> str:
    """Return what of the step is compiled: `step`, `blocks`, or `off`."""
    if step.forward != step.losses:
        return "step"
    return "blocks" if any("compute" in vars(block) for block in vit_blocks(step.model)) else "off"


def make_eager(step: TrainStep) -> None:
    """Make a compiled step eager, for good."""
    for block in vit_blocks(step.model):
        vars(block).pop("compute", None)
    step.forward, step.cast_blocks = step.losses, []
    drop_gradients(step.optimizer)


@contextlib.contextmanager
def eager(step: TrainStep) -> Iterator[None]:
    """Run a compiled step eagerly within."""
    forward, cast_blocks = step.forward, step.cast_blocks
    step.forward, step.cast_blocks = step.losses, []
    try:
        with uncompiled(step.model):
            yield
    finally:
        step.forward, step.cast_blocks = forward, cast_blocks


@contextlib.contextmanager
def uncompiled(model: CCMIM) -> Iterator[None]:
    """Run the blocks eagerly within, so that hooks of their parts are called."""
    compiled = {block: vars(block).pop("compute") for block in vit_blocks(model) if "compute" in vars(block)}
    try:
        yield
    finally:
        for block, compute in compiled.items():
            block.compute = compute


def warm_up(step: TrainStep, batch: int, accumulate: int, steps: int = 2) -> bool:
    """Take some steps on made images, so that everything is compiled before the run, and undo them.

    Weights, optimizer, scaler, averages and random numbers are as before, in the same memory. Where the compiled step
    fails, the step is eager from then on, one line on standard error says why, and False is returned.

    Args:
        batch: images of a micro-batch, of which a step has `accumulate`.
    """
    with dry_run(step):
        batches = [synthetic_batch(step, batch) for _ in range(accumulate)]
        try:
            with _without_inductors_log():
                _take(step, batches, steps)
            return True
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if compiled_as(step) == "off":
                raise
            _give_up(step, error)
        _take(step, batches, steps)
        return False


@contextlib.contextmanager
def _without_inductors_log() -> Iterator[None]:
    """Keep inductor's scheduler from logging a failure, a line per node around it, which its exception tells too."""
    logger = logging.getLogger("torch._inductor.scheduler")

    def below_critical(record: logging.LogRecord) -> bool:
        return record.levelno < logging.CRITICAL

    logger.addFilter(below_critical)
    try:
        yield
    finally:
        logger.removeFilter(below_critical)


def _give_up(step: TrainStep, error: Exception) -> None:
    reason = " ".join(str(error).split())[:300]
    print(f"train.compile failed, the run goes on without: {type(error).__name__}: {reason}", file=sys.stderr)
    make_eager(step)


def _take(step: TrainStep, batches: list[Batch], steps: int) -> None:
    for _ in range(steps):
        step(batches, 0.0)


class GraphedStep:
    """A `TrainStep` whose device work is one launch of a CUDA graph. Called like the step it replays.

    Images and what belongs to them are copied into buffers of its own, so a loader may reuse its memory at once.
    Capture takes place at the first call, after the warm-up has created the optimizer's state and a checkpoint, if any,
    has filled it: a graph replays addresses. The optimizer is `capturable`, the process alone.
    """

    def __init__(self, step: TrainStep):
        self.step = step
        self._batches: list[Batch] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: StepResult | None = None

    def __call__(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Train as `TrainStep.__call__`; the next call overwrites the result."""
        if self._graph is None:
            self._capture(batches)
        for static, batch in zip(self._batches, batches, strict=True):
            for name, tensor in _tensors_of(batch).items():
                getattr(static, name).copy_(tensor, non_blocking=True)
        set_lr(self.step.optimizer, lr)
        self._graph.replay()
        return self._result

    def _capture(self, batches: Sequence[Batch]) -> None:
        """Record the step on copies of the batches, without running it."""
        self._batches = [Batch(**{name: tensor.clone() for name, tensor in _tensors_of(b).items()}) for b in batches]
        drop_gradients(self.step.optimizer)
        torch.cuda.synchronize(self.step.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = self.step.run(self._batches)


def _tensors_of(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor)}
