"""This script measures the GPU memory of each preset's step by torch's own allocator.

    python benchmarks/memory.py [PRESET ...]

It needs a CUDA device, and takes one GPU's share of each preset. tests/nullgpu/ runs the same on a device that computes
nothing, as one of many ranks: benchmarks/results/2026-11-30-memory-null-device.md is its prediction.
The memory of the CUDA context, of NCCL, of DALI and of a score bank's maps comes on top of it.
"""

import gc
import re
import sys
from typing import NamedTuple

import torch

from ccmim_fast.config.load import load_config, presets
from ccmim_fast.engine.build import build_step, check_device
from ccmim_fast.engine.dry_run import synthetic_batch
from ccmim_fast.ranks.session import Session

# Plain PyTorch, whatever `auto` finds to be the fastest: its figures are the same on each machine.
PLAIN = ("--train.device=cuda", "--train.kernels=reference", "--train.attention=sdpa", "--train.compile=off")
STATED = re.compile(
    r"^# Memory: ([\d.]+) GB with (\d+) images on (?:one|each of (\d+)) GPUs?, ([\d.]+) GB of it at rest, "
    r"([\d.]+) MB per image",
    re.MULTILINE,
)


class Layout(NamedTuple):
    """What the header of a preset says of each GPU.

    Attributes:
        peak_gb: of torch's allocator in a step, of which `at_rest_gb` stay between steps.
        images: of a micro-batch.
        mb_per_image: the difference, divided among the images.
    """

    peak_gb: float
    images: int
    gpus: int
    at_rest_gb: float
    mb_per_image: float


class Memory(NamedTuple):
    """Bytes on the GPU: of the model, between two steps, at the step's peak, and what the allocator holds by then."""

    weights: int
    at_rest: int
    peak: int
    reserved: int


def stated(preset: str) -> Layout:
    """Return what the header of a preset says."""
    found = STATED.search(presets()[preset].read_text())
    if found is None:
        raise ValueError(f"{preset}: its header has no line '# Memory: ...' of the form {STATED.pattern}")
    return Layout(float(found[1]), int(found[2]), int(found[3] or 1), float(found[4]), float(found[5]))


def step_memory(preset: str, images: int, here: Session, *settings: str) -> Memory:
    """Return the memory of a preset's third step with `images` in each micro-batch; each rank of a group calls it."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    accumulate = load_config([f"--config={preset}"], "memory").train.accumulate
    batch = images * accumulate * here.world_size
    config = load_config([f"--config={preset}", *PLAIN, f"--train.batch_size={batch}", *settings], "memory")
    check_device(config, here)
    step = build_step(config, here)
    weights = torch.cuda.memory_allocated()
    batches = [synthetic_batch(step, images) for _ in range(accumulate)]
    for _ in range(2):  # the optimizer's state is made in the first, DDP's buckets are laid out anew in the second
        step(batches, 0.0)
    at_rest = torch.cuda.memory_allocated()
    step(batches, 0.0)
    return Memory(weights, at_rest, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


def row(preset: str, layout: Layout, memory: Memory) -> list[str]:
    """Return a line of the table: `HEADER` names its cells."""
    gigabytes = [f"{size / 1e9:.2f}" for size in memory]
    each = (memory.peak - memory.at_rest) / layout.images / 1e6
    return [f"`{preset}`", str(layout.gpus), str(layout.images), *gigabytes, f"{each:.1f}", f"{layout.peak_gb:g}"]


HEADER = ["preset", "GPUs", "images", "weights GB", "at rest GB", "peak GB", "reserved GB", "MB per image", "header GB"]


def main(chosen: list[str]) -> int:
    print(f"{torch.cuda.get_device_name()}, one GPU\n\n| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}")
    for preset in chosen or sorted(presets()):
        layout = stated(preset)._replace(gpus=1)
        memory = step_memory(preset, layout.images, Session(0, 1, torch.device("cuda")))
        print(f"| {' | '.join(row(preset, layout, memory))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
