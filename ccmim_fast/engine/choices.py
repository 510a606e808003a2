"""What the settings `auto` come to in a run: measured on its own step, or as the run, or this machine, decided before.

A question is asked for each op (its kernels), each shape of attention (its backend), each shape of a CPU's linear
layers (whose products), for a CPU's teacher (8 bits or not), for the loader, and for torch.compile. The candidates on
CUDA begin with ours: Triton's kernels, xformers.
"""

import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks

from ccmim_fast.autotune.calls import StepCall, calls_of
from ccmim_fast.autotune.decide import (
    Decision,
    Question,
    fastest_that_agree,
    first_that_run,
    milliseconds,
    timed,
    winner,
)
from ccmim_fast.autotune.loaders import fastest_loader
from ccmim_fast.autotune.table import FILE, Table, machine, path_of, read_table, write_table
from ccmim_fast.checkpoints.manifest import CHECKPOINTS
from ccmim_fast.config.keys import flatten, settings
from ccmim_fast.config.schema import Config, RunConfig
from ccmim_fast.data.build import suitable_loaders
from ccmim_fast.data.source import Source
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.data.threads import thread_count
from ccmim_fast.engine.compile import choose_compile, compiled_as, eager, make_eager
from ccmim_fast.engine.dry_run import dry_run, synthetic_batch
from ccmim_fast.engine.step import TrainStep
from ccmim_fast.engine.teacher import choose_teacher
from ccmim_fast.models.block import attending_by
from ccmim_fast.models.encoder import configure_blocks
from ccmim_fast.models.precision import LINEAR
from ccmim_fast.profile.meter import seconds_of
from ccmim_fast.ranks.fsdp import is_sharded, let_go
from ccmim_fast.ranks.session import Session, broadcast

LEAST_FLOPS = 1e13  # of a whole run; the demo's 2.4e13 take two cores eight minutes, of which measuring takes seconds
SECONDS = 14.0  # after which no round of a measurement begins
_FORM_SECONDS = {"cuda": 4.0, "cpu": 60.0}  # the same for whole steps, which are timed after that
_LONG = 3e15  # FLOPs of a run on a CPU, two hours of two cores: compiling takes 1 to 2 minutes, and saves 4 to 5 %
_FORM_ERROR = 0.02  # of the losses: products of 16 bits in another order, and now and then another patch is masked
_CHECKED = 2  # images that implementations are compared on; the heads' BatchNorm needs two rows
_FORWARD = 0.5  # seconds, about, of the forward pass that is measured on a CPU: as many images as it takes
# Beside the settings that decide the shape of a weight: what decides the shapes of calls, or which calls there are.
_SIZES = ("mask.ratio", "mask.strategy", "score.source", "score.block", "score.blocks", "teacher.tokens")
_SIZES += ("teacher.precision", "target.norm_pix", "train.kernels", "train.attention", "train.compile")
_SIZES += ("train.recompute", "train.parallel")
# On CUDA `plain` is no candidate: it keeps the weights of attention, so a batch that fits would not fit with it.
_ATTENTION = {"cuda": ("xformers", "flash", "efficient", "cudnn", "sdpa"), "cpu": ("sdpa", "plain")}
_KERNELS = {"cuda": ("triton", "reference"), "cpu": ("reference",)}


def choose(
    step: TrainStep,
    micro_batch: int,
    here: Session,
    samples: int,
    source: Source | None = None,
    folder: Path | None = None,
) -> Table:
    """Decide what the settings `auto` of an eager step come to; every rank calls it, and all get the first one's table.

    Args:
        micro_batch: images of a rank's forward pass.
        samples: images of the whole run; a short one is over before measuring pays.
        source: the images, for which a loader is chosen where the settings leave it open.
        folder: of the run that is resumed, whose decisions stay.
    """
    how, loaders = step.config.train.autotune, _loaders(step, source)
    where = machine(here.device) | _sizes(step, micro_batch, here)
    if loaders:
        where |= {"data": source.fingerprint[:16], "threads": str(thread_count(step.config.data.workers))}
    long = _arithmetic(step, samples) >= LEAST_FLOPS
    measures = how != "off" and (how == "fresh" or long) and _computes(here.device)
    kept = [folder / FILE] if folder is not None else []
    if measures and how == "cached":
        kept.append(path_of(where))
    known = (table for table in (read_table(path, where) for path in kept) if table is not None)
    if (table := broadcast(next(known, None) if here.is_main else None)) is not None:
        return table
    if not measures:
        calls = _calls(step, _CHECKED)[0] if here.device.type == "cuda" else {}
        return Table(where, first_that_run(_questions(step, calls), calls))
    start = time.perf_counter()
    decisions = {}
    if loaders and here.is_main:
        decisions["loader"] = fastest_loader(source, step.config.data, loaders, here.device)
    decisions = broadcast(decisions | _measured(step, micro_batch, here, start + SECONDS))
    table = Table(where, decisions, round(time.perf_counter() - start, 3))
    # On a machine with much other work time runs out: the next run tries again.
    if here.is_main and how == "cached" and table.complete:
        write_table(path_of(where), table)
    return table


def _arithmetic(step: TrainStep, samples: int) -> float:
    """Return about how many FLOPs a run of so many images has: six for each weight, patch and image."""
    rows, columns = step.model.grid
    return 6.0 * sum(p.numel() for p in step.model.parameters()) * rows * columns * samples


def run_of(run: RunConfig) -> Path | None:
    """Return the folder of the run that `run.resume` goes on with; None for a new run."""
    if run.resume == "never":
        return None
    named = Path(run.resume).absolute()
    return Path(run.dir) if run.resume == "auto" else named.parent.parent if named.parent.name == CHECKPOINTS else named


def apply(table: Table, step: TrainStep) -> None:
    """Let the step run as decided, where the settings leave it open."""
    kernels: dict[str, str] = {}
    by_shape: dict[str, dict[tuple[int, ...], str]] = {"attention": {}, "linear": {}}
    for name, candidate in table.chosen().items():
        kind, _, sizes = name.partition(" ")
        if kind in by_shape:
            by_shape[kind][tuple(int(size) for size in sizes.split(" x "))] = candidate
        else:
            kernels[name] = candidate
    for other in ("loader", "compile"):
        kernels.pop(other, None)
    step.teacher = kernels.pop("teacher", step.teacher)
    if kernels:
        _set_kernels(step, kernels)
    if by_shape["attention"]:
        configure_blocks(step.model.modules(), attention=tuple(by_shape["attention"].items()))
    if step.linear is not None:
        step.linear = by_shape["linear"] if "onednn" in by_shape["linear"].values() else None


def to_compile(table: Table, step: TrainStep, here: Session, samples: int) -> str:
    """Return what of the step is compiled: `train.compile`, or what its `auto` comes to, as far as that is known.

    On a CPU that is the step of a long run of one process, whose form is then measured; its teacher has no 8 bits.
    """
    asked, known = step.config.train.compile, table.chosen().get("compile", "")
    if asked == "auto" and step.device.type == "cpu":
        long = _arithmetic(step, samples) >= _LONG and here.world_size == 1
        return (known or "step") if long and table.seconds and step.teacher == "same" else "off"
    return known or choose_compile(asked, step.device, divided=is_sharded(step.model))


def choose_form(table: Table, step: TrainStep, micro_batch: int, here: Session) -> Table:
    """Hold a step that `auto` compiled against the eager one, on made images, and let the faster one run.

    Where a table was read, it has the answer; else it gets and keeps the decision. Ranks that wait for each other are
    not timed: the compiled step stays.
    """
    train, compiled = step.config.train, compiled_as(step)
    open_ = train.compile == "auto" and compiled != "off" and not train.cuda_graph
    if not open_ or here.world_size > 1 or not table.seconds or "compile" in table.decisions:
        return table
    start = time.perf_counter()
    with dry_run(step):
        decision = _form(step, compiled, [synthetic_batch(step, micro_batch)], start + _FORM_SECONDS[step.device.type])
    if decision.chosen == "off":
        make_eager(step)
    seconds = round(table.seconds + time.perf_counter() - start, 3)
    table = table._replace(decisions={**table.decisions, "compile": decision}, seconds=seconds)
    if train.autotune == "cached" and table.complete:
        write_table(path_of(table.where), table)
    return table


def _form(step: TrainStep, compiled: str, batches: list[Batch], until: float) -> Decision:
    def seconds(form: AbstractContextManager) -> float:
        with form:
            return seconds_of(lambda: step(batches, 0.0), step.device)

    try:
        with eager(step):
            expected = step(batches, 0.0).total.item()
    except torch.cuda.OutOfMemoryError:
        return Decision(compiled, {}, {"off": "out of memory"})
    found = step(batches, 0.0).total.item()
    # Written so that NaN fails.
    if not abs(found - expected) <= _FORM_ERROR * abs(expected):
        return Decision("off", {}, {compiled: f"the loss is {found:.6g}, of the eager step {expected:.6g}"})
    times = timed({compiled: lambda: seconds(nullcontext()), "off": lambda: seconds(eager(step))}, until)
    return Decision(winner(times) if times else compiled, milliseconds(times), {})


def _set_kernels(step: TrainStep, kernels: str | Mapping[str, str]) -> None:
    for module in (*step.model.modules(), *step.objective.modules()):
        if hasattr(module, "kernels"):
            module.kernels = kernels


def _questions(step: TrainStep, names: Iterable[str]) -> dict[str, Question]:
    """Return the questions that the settings leave open and that have more than one candidate."""
    train, kind = step.config.train, step.device.type
    compiles = choose_compile(train.compile, step.device) != "off"
    found = {}
    for name in names:
        if name.startswith("linear "):
            # A sum of some hundred products in another order: oneDNN's errs up to four times as much as MKL's.
            found[name] = Question(LINEAR, "torch", factor=8.0)
        elif name.startswith("attention "):
            if train.attention == "auto":
                # Of the ops torch.compile knows nothing but shapes; through attention it traces.
                factor = 4.0 if kind == "cpu" else 2.0  # its fused kernel adds in blocks, which errs twice as much
                found[name] = Question(_ATTENTION[kind], "plain", factor, compiles)
        elif train.kernels == "auto":
            found[name] = Question(_KERNELS[kind], "reference")
    return {name: question for name, question in found.items() if len(question.candidates) > 1}


def _measured(step: TrainStep, micro_batch: int, here: Session, until: float) -> dict[str, Decision]:
    """Check and time the candidates; other ranks than the first take part in the forward passes alone."""
    few, seconds = _calls(step, _CHECKED)
    images = micro_batch
    if here.device.type == "cpu":
        images = min(micro_batch, max(_CHECKED, broadcast(int(_CHECKED * _FORWARD / seconds))))
    calls = few if images == _CHECKED else _calls(step, images)[0]
    if not here.is_main:
        return {}
    decisions = fastest_that_agree(_questions(step, calls), few, calls, here.device, until)
    if (teacher := choose_teacher(step, micro_batch)) is not None:
        decisions["teacher"] = teacher
    if here.device.type == "cuda":
        torch.cuda.empty_cache()
    return decisions


def _calls(step: TrainStep, images: int) -> tuple[dict[str, list[StepCall]], float]:
    """Return the calls of a step's forward pass over made images, and the pass's seconds.

    The reference runs, and nothing is kept for a backward pass: that of an eager step may need more memory than there
    is, where a compiled one's does not.
    """

    def forward() -> None:
        batch = synthetic_batch(step, images)
        with saved_tensors_hooks(lambda saved: None, lambda nothing: nothing):
            step.losses(batch.images_BHWC, batch.ids_B, batch.epochs_B, batch.boxes_B4, batch.maps_BGG)

    train, wrapped = step.config.train, step.wrapped
    with dry_run(step), attending_by(step.model, "sdpa" if train.attention == "auto" else train.attention):
        step.wrapped = step.model  # DDP would wait for a backward pass
        _set_kernels(step, "reference" if train.kernels == "auto" else train.kernels)
        start = time.perf_counter()
        try:
            return calls_of(forward, step.device), time.perf_counter() - start
        finally:
            step.wrapped = wrapped
            _set_kernels(step, train.kernels)
            let_go(step.model)


def _loaders(step: TrainStep, source: Source | None) -> list[str]:
    """Return the names of the loaders to choose from; none where there is no choice."""
    names = [] if source is None or step.config.data.loader != "auto" else list(suitable_loaders(source))
    return names if len(names) > 1 else []


def _sizes(step: TrainStep, micro_batch: int, here: Session) -> dict[str, str]:
    """Return what decides the shapes of a step's calls."""
    asked = {key for key, known in settings(Config).items() if known.on_resume == "shape" or key in _SIZES}
    sizes = {key: str(value) for key, value in flatten(step.config).items() if key in asked}
    return sizes | {"precision": step.precision.name, "images": str(micro_batch), "ranks": str(here.world_size)}


def _computes(device: torch.device) -> bool:
    """Return whether the device computes at all: one that stands in for a GPU, to try a program, does not."""
    if device.type == "cpu":
        return True
    doubled = torch.tensor([1.0, 2.0, 3.0]).to(device) * 2
    if doubled.tolist() == [2.0, 4.0, 6.0]:
        return True
    print(f"train.autotune: {device} computes nothing, so nothing is measured", flush=True)
    return False
