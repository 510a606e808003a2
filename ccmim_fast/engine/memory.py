"""This file finds how many images fit into memory, by trying, and advises after a run that had too many.

A step's need grows linearly with its images, so the peaks of two small steps tell how many should fit (fault 17).
"""

import bisect
import dataclasses
import functools
import gc
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from ccmim_fast.config.schema import Config
from ccmim_fast.config.validate import check_batch
from ccmim_fast.engine.build import build_step, has_bank
from ccmim_fast.engine.compile import choose_compile, compile_step, warm_up
from ccmim_fast.engine.dry_run import synthetic_batch
from ccmim_fast.errors import CPU_MEMORY, MachineError, say
from ccmim_fast.ranks.session import Session, max_over_ranks
from ccmim_fast.runs.state import read_state, write_state

SMALLEST = 2  # images; the heads' BatchNorm needs two rows
MEASURED = (2, 4)  # images of the steps whose peaks are measured


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number in SMALLEST .. limit that fits, 0 if none does; at most 2 log2(limit) trials.

    The trials begin at the smallest: the first steps load libraries, which need memory of their own.
    """
    fitting, trial = 0, SMALLEST
    while trial <= limit and fits(trial):
        fitting, trial = trial, 2 * trial
    if not fitting:
        return 0
    between = range(fitting + 1, min(trial, limit + 1))
    return fitting + bisect.bisect_left(between, True, key=lambda number: not fits(number))


def extrapolated(peak_of: Callable[[int], int], room: int) -> int:
    """Return the largest micro-batch whose step needs at most `room` bytes, 0 if not even one of `MEASURED` fits.

    `peak_of` tells what a step on so many images needs, or raises torch.OutOfMemoryError.
    """
    few, more = MEASURED
    try:
        low, high = peak_of(few), peak_of(more)
    except torch.OutOfMemoryError:
        return 0
    slope = (high - low) / (more - few)
    return few + int((room - low) / slope) if slope > 0 and room >= low else 0


def with_largest_batch(config: Config, here: Session, fits: Callable[[int], bool] | None = None) -> Config:
    """Return `config` with the smallest `train.accumulate` whose micro-batch fits every rank; prints what was found.

    Each rank tries alone (or asks `fits`), since one whose memory is full would leave the others waiting in a
    collective; all ranks agree on the outcome before the next trial. Raises MachineError where not even two images fit,
    ConfigError where the images of a rank cannot be divided into micro-batches that fit.
    """
    fits = fits or (lambda batch: _fits(config, here, batch))

    def fit_all(batch: int) -> bool:
        return not max_over_ranks(torch.tensor(float(not fits(batch)), device=here.device))

    per_rank = config.train.batch_size // here.world_size
    found = largest(fit_all, per_rank)
    if found < SMALLEST:
        raise MachineError(f"train.find_batch: {SMALLEST} images do not fit {here.device}; try train.recompute=true")
    accumulate = _accumulation(per_rank, found) or per_rank
    if here.is_main:
        say(
            f"largest micro-batch that fits: {found} images{' (all there are)' if found == per_rank else ''}; "
            f"train.accumulate={accumulate}, {per_rank // accumulate} images each"
        )
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=accumulate))
    check_batch(config, here.world_size)
    return config


def _fits(config: Config, here: Session, batch: int) -> bool:
    """Return if the step, compiled as the run's, can be taken on `batch` images; nothing is sent to other ranks."""
    gc.collect()  # the step of the trial before refers to itself
    torch.cuda.empty_cache()
    try:
        step = build_step(config, Session(0, 1, here.device))
        step.model.leave_ranks()
        # DDP keeps all gradients once more, to send them.
        weights = sum(p.numel() for p in step.model.parameters() if p.requires_grad) if here.world_size > 1 else 0
        buckets = torch.empty(weights, device=here.device)
        compile_step(step, choose_compile(config.train.compile, here.device), config.train.compile_mode)
        warm_up(step, batch, accumulate=1)
        del buckets
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def explains_out_of_memory(fit: Callable[..., Path]) -> Callable[..., Path]:
    """Make `fit` end in a MachineError with advice where memory runs out, which state.json has too."""

    @functools.wraps(fit)
    def explained(config: Config, *rest, **named) -> Path:
        try:
            return fit(config, *rest, **named)
        except torch.OutOfMemoryError as error:
            line = _advice_for_gpu(config, error)
        except (RuntimeError, MemoryError) as error:
            asked = CPU_MEMORY.search(str(error))
            if asked is None and not isinstance(error, MemoryError):
                raise
            line = _advice_for_host(config, int(asked[1]) if asked else 0)
        # The run has recorded torch's words, if this process is the one that records.
        folder = Path(config.run.dir)
        state = read_state(folder)
        if state is not None and state.pid == os.getpid() and state.state == "failed":
            write_state(folder, state._replace(error=line, exit_code=MachineError.exit_code))
        raise MachineError(line)

    return explained


def _advice_for_gpu(config: Config, error: torch.OutOfMemoryError) -> str:
    on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    # Read while the run's own memory is held: what DALI holds is neither free nor torch's.
    free, total = torch.cuda.mem_get_info(device)
    room = free + torch.cuda.memory_reserved(device)
    if has_bank(config) and config.score.store in ("auto", "device"):
        room -= int(config.score.device_gb * 1e9)  # at most; the peaks are measured without the maps
    # The model and the activations hang on the frames that the error came through.
    traceback.clear_frames(error.__traceback__)
    del error
    per_rank = _images_of_rank(config)
    failed = per_rank // config.train.accumulate
    most = min(extrapolated(lambda batch: _peak(config, device, batch), room), failed - 1)
    words = f"out of memory: a micro-batch of {failed} images does not fit {device} ({total / 1e9:.1f} GB)"
    if most < MEASURED[0]:
        return f"{words}, nor do {MEASURED[0]}; set train.recompute=true, or take a smaller model.arch"
    ways = [f"train.batch_size={most * config.train.batch_size // failed}"]
    if accumulate := _accumulation(per_rank, most):
        ways.insert(0, f"train.accumulate={accumulate} ({per_rank // accumulate} images each)")
    return f"{words}; {most} should, measured on smaller ones: set {' or '.join(ways)}"


def _advice_for_host(config: Config, asked: int) -> str:
    """No peak is known of the host's memory: half as many images are worth a try."""
    per_rank = _images_of_rank(config)
    size, accumulate = f", {asked / 1e9:.1f} GB at once" if asked else "", config.train.accumulate
    words = f"out of the host's memory{size}, with micro-batches of {per_rank // accumulate} images"
    if accumulate := _accumulation(per_rank, per_rank // accumulate // 2):
        return f"{words}; try train.accumulate={accumulate} ({per_rank // accumulate} images each)"
    return f"{words}; try train.recompute=true, or a smaller model.arch"


def _peak(config: Config, device: torch.device, batch: int) -> int:
    """Return the bytes that a rank's eager step needs, by trying it; no process group is left by then."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step = build_step(config, Session(0, 1, device))
    for _ in range(2):  # the optimizer's state is there from the second step on
        step([synthetic_batch(step, batch)], 0.0)
    return torch.cuda.max_memory_allocated(device)


def _accumulation(per_rank: int, most: int) -> int:
    """Return the smallest `train.accumulate` whose micro-batches have SMALLEST to `most` images; 0: there is none."""
    return next((n for n in range(1, per_rank // SMALLEST + 1) if per_rank % n == 0 and per_rank // n <= most), 0)


def _images_of_rank(config: Config) -> int:
    return config.train.batch_size // int(os.environ.get("WORLD_SIZE", 1))
