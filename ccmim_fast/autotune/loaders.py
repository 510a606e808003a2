"""The choice of a loader: which brings more of the user's images in a second, with the same pixels as the reference."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import torch

from ccmim_fast.autotune.check import failure
from ccmim_fast.autotune.decide import Decision, milliseconds, winner
from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.build import build_loader
from ccmim_fast.data.source import Source, usable_count
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.profile.meter import synchronise

REFERENCE = "torch"
LEVELS = 2.0  # of 255, that an image may differ from the reference's on average; docs/faults.md, row 3
_BATCH = 32  # images; so few that half a second is several batches on two cores (DALI: 650 images a second)
_ROUNDS, _SECONDS = 4, 0.5  # of which the first empties what was loaded ahead, and does not count


def fastest_loader(source: Source, data: DataConfig, names: list[str], device: torch.device) -> Decision:
    """Load images by each loader, in turns; the first of the names is taken unless another one is faster."""
    batch = min(_BATCH, usable_count(source))
    dropped: dict[str, str] = {}
    with ExitStack() as opened:
        streams: dict[str, Iterator[Batch]] = {}
        expected = None
        for name in sorted(names, key=lambda name: name != REFERENCE):
            own = replace(data, loader=name, on_error="skip", max_bad=1.0)
            try:
                stream = build_loader(source, own, 0, batch, device=device).stream(0)
                streams[name] = opened.enter_context(closing(stream))
                found = next(stream)
            except Exception as error:  # a library's own; another loader takes its place
                dropped[name] = failure(error)
                continue
            expected = expected or found
            if why := _difference(found, expected):
                dropped[name] = why
        left = [name for name in names if name not in dropped]
        if len(left) < 2:
            return Decision((left or [REFERENCE])[0], {}, dropped)
        rounds = [{name: _seconds(streams[name], batch, device) for name in left} for _ in range(_ROUNDS)]
    times = {name: [one[name] for one in rounds[1:]] for name in left}
    return Decision(winner(times), milliseconds(times), dropped)


def _difference(found: Batch, expected: Batch) -> str:
    if not torch.equal(found.ids_B, expected.ids_B):
        return "its images are others than the reference's, or in another order"
    levels = float((found.images_BHWC.float() - expected.images_BHWC.float()).abs().flatten(1).mean(1).max())
    if levels <= LEVELS:
        return ""
    return f"an image differs by {levels:.3g} of 255 levels on average, allowed are {LEVELS:g}"


def _seconds(stream: Iterator[Batch], batch: int, device: torch.device) -> float:
    """Return the seconds of an image, over `_SECONDS` at least."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        next(stream)
        count += batch
    synchronise(device)
    return (time.perf_counter() - start) / count
