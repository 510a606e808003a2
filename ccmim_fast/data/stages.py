"""Where the time of an image goes before it is trained on: reading, decoding, cropping."""

import time
from statistics import median
from typing import NamedTuple

import numpy as np

from ccmim_fast.data.index.indexed import IndexedSource
from ccmim_fast.data.source import Source
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.data.stream.torch_loader import crop_and_resize
from ccmim_fast.errors import DataError

_ADVICE = {
    "read": "put the images into tars on a faster disk (ccmim data shard), or raise data.workers",
    "decode": "make the images smaller once (ccmim data shard --side 320), or let DALI decode them (data.loader=dali)",
    "crop": "make the images smaller once (ccmim data shard --side 320), or give the run more cores",
}


class Stages(NamedTuple):
    """Milliseconds an image takes one thread: to read, to decode with Pillow, to crop and resize."""

    read: float
    decode: float
    crop: float


def measure_stages(plan: Plan, image_size: tuple[int, int], images: int) -> Stages:
    """The medians over some images of the plan's epoch 0; those that cannot be shown are left out."""
    ids_B, epochs_B = plan.ids_at(np.arange(min(images, plan.samples)))
    times = []
    for sample in plan.showing(ids_B, epochs_B).samples():
        try:
            image_HWC, read, decode = _timed(plan.source, sample.ids_B.item())
        except DataError:
            continue
        start = time.perf_counter()
        crop_and_resize(image_HWC, sample.boxes_B4[0], sample.flips_B.item(), image_size)
        times.append((read, decode, time.perf_counter() - start))
    return Stages(*(1e3 * median(column) for column in zip(*times, strict=True))) if times else Stages(0.0, 0.0, 0.0)


def _timed(source: Source, index: int) -> tuple[np.ndarray, float, float]:
    """An image, and the seconds it took to read and to decode. Of a source without files nothing is read."""
    start = time.perf_counter()
    if not isinstance(source, IndexedSource):
        return source.decode(index), 0.0, time.perf_counter() - start
    data = source.encoded(index)
    read = time.perf_counter()
    image_HWC = source.decoded(index, data)
    return image_HWC, read - start, time.perf_counter() - read


def advice(stages: Stages) -> str:
    """What to do about the slowest one."""
    slowest = max(stages._fields, key=lambda name: getattr(stages, name))
    parts = ", ".join(f"{name} {getattr(stages, name):.1f}" for name in stages._fields)
    return f"milliseconds an image: {parts}; {_ADVICE[slowest]}"
