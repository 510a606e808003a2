"""Out of memory: one line with the micro-batch that should fit, from peaks measured on two small ones (fault 17)."""

import functools
import gc
import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from ccmim_fast.config.schema import Config
from ccmim_fast.engine.build import build_step, has_bank
from ccmim_fast.engine.dry_run import synthetic_batch
from ccmim_fast.errors import MachineError
from ccmim_fast.ranks.session import Session
from ccmim_fast.runs.state import read_state, write_state

MEASURED = (2, 4)  # images; what a step needs grows linearly with them: two points give the line
_OF_CPU = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")


def tells_what_fits(fit: Callable[..., Path]) -> Callable[..., Path]:
    """`fit`, which ends in a MachineError with advice where it runs out of memory. It is not tried again.

    Its state.json then says the same.
    """

    @functools.wraps(fit)
    def told(config: Config, *rest, **named) -> Path:
        try:
            return fit(config, *rest, **named)
        except torch.OutOfMemoryError as error:
            line = _advice_for_gpu(config, error)
        except (RuntimeError, MemoryError) as error:
            asked = _OF_CPU.search(str(error))
            if asked is None and not isinstance(error, MemoryError):
                raise
            line = _advice_for_host(config, int(asked[1]) if asked else 0)
        _correct_state(Path(config.run.dir), line)
        raise MachineError(line)

    return told


def fitting(peak_of: Callable[[int], int], room: int) -> int:
    """The images of the largest micro-batch whose step needs at most `room` bytes; 0 if not even `MEASURED` ones fit.

    Args:
        peak_of: bytes that a step on so many images needs; raises torch.OutOfMemoryError where they do not fit.
    """
    few, more = MEASURED
    try:
        low, high = peak_of(few), peak_of(more)
    except torch.OutOfMemoryError:
        return 0
    slope = (high - low) / (more - few)
    return few + int((room - low) / slope) if slope > 0 and room >= low else 0


def _advice_for_gpu(config: Config, error: torch.OutOfMemoryError) -> str:
    device = _device(config)
    # Read while the run's own memory is held: what DALI holds is neither free nor torch's.
    free, total = torch.cuda.mem_get_info(device)
    room = free + torch.cuda.memory_reserved(device)
    if has_bank(config) and config.score.store in ("auto", "device"):
        room -= int(config.score.device_gb * 1e9)  # at most; the maps were not counted when the peaks are
    # The model and the activations hang on the frames that the error came through.
    traceback.clear_frames(error.__traceback__)
    del error
    failed = _micro_batch(config)
    most = min(fitting(_peaks(config, device), room), failed - 1)
    words = f"out of memory: a micro-batch of {failed} images does not fit {device} ({total / 1e9:.1f} GB)"
    if most < MEASURED[0]:
        return f"{words}, nor do {MEASURED[0]}; set train.recompute=true, or take a smaller model.arch"
    ways = [f"train.batch_size={most * config.train.accumulate * _world_size()}"]
    accumulate = _accumulation(config, most)
    if accumulate:
        images = config.train.batch_size // (accumulate * _world_size())
        ways.insert(0, f"train.accumulate={accumulate} ({images} images each)")
    return f"{words}; {most} should, measured on smaller ones: set {' or '.join(ways)}"


def _advice_for_host(config: Config, asked: int) -> str:
    """No peak is known of the host's memory: half as many images are worth a try."""
    what = f", {asked / 1e9:.1f} GB at once" if asked else ""
    words = f"out of the host's memory{what}, with micro-batches of {_micro_batch(config)} images"
    accumulate = _accumulation(config, _micro_batch(config) // 2)
    if accumulate == 0:
        return f"{words}; try train.recompute=true, or a smaller model.arch"
    images = config.train.batch_size // (accumulate * _world_size())
    return f"{words}; try train.accumulate={accumulate} ({images} images each)"


def _peaks(config: Config, device: torch.device) -> Callable[[int], int]:
    """The peak of a rank's eager step, by trying it; to be called when no process group is there any more."""

    def peak_of(batch: int) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        step = build_step(config, Session(0, 1, device))
        for _ in range(2):  # the optimizer's state is there from the second step on
            step([synthetic_batch(step, batch)], 0.0)
        return torch.cuda.max_memory_allocated(device)

    return peak_of


def _accumulation(config: Config, most: int) -> int:
    """The smallest `train.accumulate` whose micro-batches are of `most` images or fewer, but two; 0: there is none."""
    of_rank = config.train.batch_size // _world_size()
    return next((n for n in range(1, of_rank // 2 + 1) if of_rank % n == 0 and of_rank // n <= most), 0)


def _micro_batch(config: Config) -> int:
    return config.train.batch_size // (config.train.accumulate * _world_size())


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _device(config: Config) -> torch.device:
    on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _correct_state(folder: Path, line: str) -> None:
    """The run has said that it failed, by torch's words; where this process is the one that did."""
    said = read_state(folder)
    if said is not None and said.pid == os.getpid() and said.state == "failed":
        write_state(folder, said._replace(error=line, exit_code=MachineError.exit_code))
