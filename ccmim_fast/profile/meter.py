"""The meter: images per second, arithmetic per image, and the share of the device's own matmul rate (MFU)."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ccmim_fast.models.precision import product
from ccmim_fast.ranks.session import Session

# Square matmuls large enough to be bound by arithmetic, small enough to take a moment.
_SIDE = {"cuda": 8192, "cpu": 1536}

# A tensor beyond any cache: the largest L2 of a GPU has 126 MB (B200).
_LARGE_BYTES = 2**28

# FLOPs from shapes. torch 2.15 counts attention by itself; some older ones that we support know CUDA's operators only.
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FORMULAS = {
    torch.ops.mkldnn._linear_pointwise: lambda x_RA, w_DA, *_, **__: 2 * x_RA[0] * x_RA[1] * w_DA[0],
    _ATTENTION: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    _ATTENTION_BACKWARD: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
    # What xformers calls: [B, T, N, H], of which torch 2.15 takes the tokens for heads.
    torch.ops.aten._efficient_attention_forward: lambda *shapes, **_: sdpa_flop_count(*_by_head(shapes[:3])),
    torch.ops.aten._efficient_attention_backward: lambda *shapes, **_: sdpa_backward_flop_count(*_by_head(shapes[:4])),
}

Item = TypeVar("Item")


def _by_head(shapes: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
    return [(batch, heads, tokens, width) for batch, tokens, heads, width in shapes]


def flop_counter() -> FlopCounterMode:
    """Return a context that counts the arithmetic in its body, attention of all kinds: `.get_total_flops()`."""
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


def measure_matmul_rate(device: torch.device, dtype: torch.dtype | None) -> float:
    """Return the FLOP/s of large square matmuls in the step's precision: the best of six, of any library."""
    side = _SIDE[device.type]
    a = torch.randn(side, side, device=device, dtype=dtype or torch.float32)
    libraries = [lambda: a @ a]
    if device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        libraries.append(lambda: product(a, a))
    return 2 * side**3 / min(seconds_of(call, device) for call in libraries for _ in range(6))


def measure_memory_bandwidth(device: torch.device) -> float:
    """Return the bytes/s, read plus written, of a large tensor that is scaled in place: the best of 24."""
    # In place as an optimizer's work is: a CPU also reads the target of a copy before it writes it.
    large = torch.zeros(_LARGE_BYTES // 4, device=device)
    return 2 * large.nbytes / min(seconds_of(lambda: large.mul_(1.0), device) for _ in range(24))


def seconds_of(call: Callable[[], Any], device: torch.device, times: int = 1) -> float:
    """Return the seconds that a call takes, work of the device included: the mean of so many in a row."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / times


def synchronise(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Meter:
    """The meter measures the speed since the last reading, of steps of `batch_size` images over all ranks.

    `flops_by_op` is FLOPs per image by operator, see `engine.dry_run.count_flops`; without any there is no MFU, else
    the device's rate of products in `dtype` (None: float32) is measured.
    """

    def __init__(self, batch_size: int, session: Session, flops_by_op: dict[Any, float], dtype: torch.dtype | None):
        self._batch_size, self._session, self.flops_by_op = batch_size, session, flops_by_op
        self._peak = session.world_size * measure_matmul_rate(session.device, dtype) if flops_by_op else None
        self.pause()

    def pause(self) -> None:
        """Start a new reading: the time since the last one was not spent on training."""
        self._start, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def steps(self, items: Iterable[Item], first: int) -> Iterator[Item]:
        """Yield the items, each the images of a step, the first one's number being `first`.

        The time to get an item counts as waiting for data; the step is counted when its item is handed out.
        """
        items = iter(items)
        for number in itertools.count(first):
            asked = time.perf_counter()
            self._session.watchdog.enter_phase("waiting for images")
            item = next(items, None)
            self._waited += time.perf_counter() - asked
            if item is None:
                return
            self._session.watchdog.enter_phase("in step", number)
            self._steps += 1
            yield item

    def read(self, steps_left: int) -> dict[str, float]:
        """Return the figures since the last reading: img/s over all ranks, shares, GFLOP per image, seconds left."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        steps_per_second, flops = self._steps / elapsed, sum(self.flops_by_op.values())
        images_per_second = steps_per_second * self._batch_size
        figures = {"images_per_second": images_per_second, "data_wait": self._waited / elapsed}
        if self._peak is not None:
            figures |= {"gflop_per_image": flops / 1e9, "mfu": images_per_second * flops / self._peak}
        self.pause()
        return figures | {"eta_seconds": steps_left / max(steps_per_second, 1e-9)}
