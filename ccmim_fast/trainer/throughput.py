"""Images per second, arithmetic per image, and what share of the device's own matmul rate a run reaches (MFU)."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ccmim_fast.trainer.distributed import Session

# Square matmuls large enough to be bound by arithmetic, small enough to take a moment.
_SIDE = {"cuda": 8192, "cpu": 1536}

# torch knows the arithmetic of its CUDA attention operators only.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}

Item = TypeVar("Item")


def measure_matmul_rate(device: torch.device, dtype: torch.dtype | None) -> float:
    """FLOP/s of large square matmuls on this device in the step's precision: the best of six."""
    side = _SIDE[device.type]
    a = torch.randn(side, side, device=device, dtype=dtype or torch.float32)
    best = float("inf")
    for _ in range(6):
        _synchronise(device)
        start = time.perf_counter()
        a @ a
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Meter:
    """Speed since the last reading.

    Args:
        batch_size: images per optimizer step, over all ranks.
        here: this process's place; the matmul rate is measured on its device.
        dtype: of the step's matmuls; None: float32.
    """

    def __init__(self, batch_size: int, here: Session, dtype: torch.dtype | None):
        self._batch_size = batch_size
        self._peak = measure_matmul_rate(here.device, dtype)
        self._world_size = here.world_size
        self._step_flops: int | None = None
        self.pause()

    def pause(self) -> None:
        """Start a new reading: what happened since the last one was no training."""
        self._start, self._steps, self._waited = time.perf_counter(), 0, 0.0

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Around one optimizer step. The first one's arithmetic is counted by torch's dispatcher."""
        if self._step_flops is None:
            with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
                yield
            self._step_flops = counter.get_total_flops()
        else:
            yield
        self._steps += 1

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, while the time to get each is counted as waiting for data."""
        items = iter(items)
        while True:
            asked = time.perf_counter()
            item = next(items, None)
            self._waited += time.perf_counter() - asked
            if item is None:
                return
            yield item

    def read(self, steps_left: int) -> dict[str, float]:
        """Figures since the last reading: img/s over all ranks, shares of 1, GFLOP per image, seconds left."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        steps_per_second = self._steps / elapsed
        figures = {
            "images_per_second": steps_per_second * self._batch_size,
            "data_wait": self._waited / elapsed,
            "gflop_per_image": self._step_flops * self._world_size / self._batch_size / 1e9,
            "mfu": steps_per_second * self._step_flops / self._peak,
            "eta_seconds": steps_left / max(steps_per_second, 1e-9),
        }
        self.pause()
        return figures
