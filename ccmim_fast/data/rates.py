"""How fast images come, stage by stage and by each loader, and what bounds a run."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.build import build_loader
from ccmim_fast.data.index.indexed import IndexedSource
from ccmim_fast.data.source import usable
from ccmim_fast.data.stages import Stages, advice, measure_stages
from ccmim_fast.data.stream import dali_loader
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.data.stream.prefetch import thread_count
from ccmim_fast.errors import MachineError

_SEED = 0
_STAGE_IMAGES = 64


class Rates(NamedTuple):
    """stages: of one thread. copy_ms: of an image to the device. loaders: img/s by loader. threads: that each has."""

    stages: Stages
    copy_ms: float
    loaders: dict[str, float]
    threads: int

    def lines(self) -> list[str]:
        """For people."""
        bound = 1e3 * self.threads / max(sum(self.stages), 1e-9)
        found = [f"{name:<7}{value:8.2f} ms an image, one thread" for name, value in self.stages._asdict().items()]
        found.append(f"{'copy':<7}{self.copy_ms:8.3f} ms an image, to the device")
        found.append(f"{self.threads} threads could give {bound:.0f} img/s without DALI")
        found += [f"{name:<7}{rate:8.0f} img/s" for name, rate in self.loaders.items()]
        return [*found, advice(self.stages)]


def measure_rates(source: IndexedSource, image_size: int, batch: int, images: int, workers: int, device: str) -> Rates:
    """Load `images` images with each loader that can read them, after as many to warm up.

    Raises:
        DataError: no image can be shown.
        MachineError: no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("--device=cuda: no CUDA device is visible; use --device=cpu")
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    batch = min(batch, usable(source))
    data = DataConfig(
        loader="torch", image_size=(image_size, image_size), channels=source.channels, workers=workers, max_bad=1.0
    )
    kinds = ["torch"] + ["dali"] * (source.channels in (1, 3) and dali_loader.is_installed())
    loaders = {kind: build_loader(source, replace(data, loader=kind), _SEED, batch, device=where) for kind in kinds}
    # First, while nothing but a former run has put the files into memory.
    stages = measure_stages(loaders["torch"].plan, data.image_size, _STAGE_IMAGES)
    copy_ms = _copy_ms((batch, *data.image_size, source.channels), where)
    rates = {kind: _images_per_second(loader.stream(0), batch, images) for kind, loader in loaders.items()}
    return Rates(stages, copy_ms, rates, thread_count(workers))


def _images_per_second(stream: Iterator[Batch], batch: int, images: int) -> float:
    steps = max(1, images // batch)
    for _ in itertools.islice(stream, steps):
        pass
    start = time.perf_counter()
    *_, last = itertools.islice(stream, steps)
    last.images_BHWC.flatten()[0].item()  # on a GPU: wait for it
    rate = steps * batch / (time.perf_counter() - start)
    stream.close()
    return rate


def _copy_ms(shape: tuple[int, ...], device: torch.device) -> float:
    images_BHWC = torch.zeros(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    out = torch.empty(shape, dtype=torch.uint8, device=device)
    out.copy_(images_BHWC)
    start = time.perf_counter()
    for _ in range(10):
        out.copy_(images_BHWC, non_blocking=True)
    out.flatten()[0].item()
    return (time.perf_counter() - start) * 1e3 / (10 * shape[0])
