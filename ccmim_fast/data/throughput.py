"""This module measures how fast images arrive: the time of each stage, and the speed of each loader."""

import itertools
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.benchmark import Timer

from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.build import build_loader, suitable_loaders
from ccmim_fast.data.index.indexed import IndexedSource
from ccmim_fast.data.source import Source, usable_count
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.data.stream.torch_loader import crop_and_resize
from ccmim_fast.data.threads import thread_count
from ccmim_fast.errors import DataError, MachineError

_SEED = 0
_STAGE_IMAGES = 64
# What makes the slowest stage faster: of images of 8 bits in gray or RGB, of others that are stored, of made ones.
_PICTURES = {
    "read": "put the images into tars on a faster disk (ccmim data shard), or raise data.workers",
    "decode": "make the images smaller once (ccmim data shard --side 320), or let DALI decode them (data.loader=dali)",
    "crop": "make the images smaller once (ccmim data shard --side 320), or give the run more cores",
}
_ARRAYS = {
    "read": _PICTURES["read"],
    "decode": "store the images without compression, or cut into smaller ones, or give the run more cores",
    "crop": "cut the images into smaller ones once, or give the run more cores",
}
_MADE = {
    "read": "give the run more cores",
    "decode": "let data.root name a folder that keeps made images, or give the run more cores",
    "crop": "give the run more cores",
}


class StageTimes(NamedTuple):
    """One thread needs so many milliseconds to read an image, to decode it with Pillow, and to crop and resize it."""

    read: float
    decode: float
    crop: float

    def advice(self, source: Source) -> str:
        """Return one line with the three times and what makes the slowest stage faster for images of such a source."""
        times = self._asdict()
        parts = ", ".join(f"{name} {value:.1f}" for name, value in times.items())
        ways = _MADE
        if getattr(source, "index", None) is not None:
            ways = _PICTURES if source.channels in (1, 3) and source.dtype == np.uint8 else _ARRAYS
        return f"milliseconds an image: {parts}; {ways[max(times, key=times.get)]}"


class Throughput(NamedTuple):
    """The report of `ccmim data bench` holds the speed of every part."""

    stages: StageTimes  # of one thread
    copy_ms: float  # of an image to the device
    loaders: dict[str, float]  # images per second, by name
    threads: int  # that each loader has
    source: Source  # whose images they are

    def lines(self) -> list[str]:
        """Return the report as text."""
        bound = 1e3 * self.threads / max(sum(self.stages), 1e-9)
        return [
            *(f"{name:<7}{value:8.2f} ms an image, one thread" for name, value in self.stages._asdict().items()),
            f"{'copy':<7}{self.copy_ms:8.3f} ms an image, to the device",
            f"{self.threads} threads could give {bound:.0f} img/s without DALI",
            *(f"{name:<7}{rate:8.0f} img/s" for name, rate in self.loaders.items()),
            self.stages.advice(self.source),
        ]


def measure_throughput(
    source: IndexedSource, image_size: int, batch: int, images: int, workers: int, device: str
) -> Throughput:
    """Load `images` images with each loader that can read them, after a warm-up with as many.

    Raises DataError if no image can be loaded, MachineError if there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("--device=cuda: no CUDA device is visible; use --device=cpu")
    on = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    batch = min(batch, usable_count(source))
    data = DataConfig(image_size=(image_size, image_size), channels=source.channels, workers=workers, max_bad=1.0)
    loaders = {
        name: build_loader(source, replace(data, loader=name), _SEED, batch, device=on)
        for name in reversed(suitable_loaders(source))
    }
    # The stages come first: the loaders would bring the files from the disk into memory.
    stages = measure_stage_times(Plan(source, _SEED, batch), data.image_size, _STAGE_IMAGES)
    shape = (batch, *data.image_size, source.channels)
    pixels = torch.from_numpy(np.zeros(shape, dtype=source.dtype))
    images_BHWC = pixels.pin_memory() if on.type == "cuda" else pixels
    tensors = {"images": images_BHWC, "out": torch.empty_like(images_BHWC, device=on)}
    # The timer warms up, and waits for the device.
    timer = Timer("out.copy_(images, non_blocking=True)", globals=tensors, num_threads=torch.get_num_threads())
    copy_ms = timer.timeit(10).mean * 1e3 / batch
    rates = {name: _images_per_second(loader.stream(0), batch, images) for name, loader in loaders.items()}
    return Throughput(stages, copy_ms, rates, thread_count(workers), source)


def measure_stage_times(plan: Plan, image_size: tuple[int, int], images: int) -> StageTimes:
    """Return the medians over `images` images of the plan's epoch 0; images that fail do not count."""
    source, times = plan.source, []
    for sample in plan.micro_batch(*plan.ids_at(np.arange(min(images, plan.samples)))).samples():
        index = sample.ids_B.item()
        start = read = time.perf_counter()
        try:
            if isinstance(source, IndexedSource):
                data = source.encoded(index)
                read = time.perf_counter()
                image_HWC = source.decoded(index, data)
            else:
                image_HWC = source.decode(index)
        except DataError:
            continue
        decoded = time.perf_counter()
        crop_and_resize(image_HWC, sample.boxes_B4[0], sample.flips_B.item(), image_size)
        times.append((read - start, decoded - read, time.perf_counter() - decoded))
    return StageTimes(*(1e3 * median(column) for column in zip(*times))) if times else StageTimes(0.0, 0.0, 0.0)


def _images_per_second(stream: Iterator[Batch], batch: int, images: int) -> float:
    steps = max(1, images // batch)
    with closing(stream):
        for _ in itertools.islice(stream, steps):
            pass
        start = time.perf_counter()
        *_, last = itertools.islice(stream, steps)
        last.images_BHWC.flatten()[0].item()  # on a GPU: wait for the batch
        return steps * batch / (time.perf_counter() - start)
