"""This module times several implementations in interleaved rounds: CUDA events, a cold L2 cache, medians, spread."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

WARM_UP = 5  # calls before the first round; the first of them compiles
# Written before each timed call, so that it finds none of its inputs in the L2 cache: the largest has 126 MB (B200).
FLUSH_BYTES = 256 * 2**20
# The GPU waits this many cycles, about 3 ms, before each timed call, while the host puts all its kernels in the queue:
# then their own time is measured, not the host's. In training too the host runs ahead.
WAIT_CYCLES = 5_000_000


class Variant(NamedTuple):
    """This class is what is timed: `run(prepare())`, of which only `run` counts."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


class Timed(NamedTuple):
    """This class holds the times of one variant.

    Attributes:
        median_us: microseconds.
        iqr_us: distance between the quartiles, microseconds.
        peak_bytes: the most memory allocated beyond the inputs, what `prepare` keeps included; 0 on a CPU.
    """

    median_us: float
    iqr_us: float
    peak_bytes: int = 0


def time_variants(variants: dict[str, Variant], rounds: int, device: torch.device) -> dict[str, Timed | str]:
    """Time every variant once a round, in turn, each round starting with the next one.

    Args:
        variants: by name.
        rounds: at least 2.
        device: CUDA; on a CPU a clock is read around the call, which measures nothing worth keeping (tests only).

    Returns:
        By name; a string says why a variant could not run: no memory, or torch.compile refuses the device.
    """
    results: dict[str, Timed | str] = {}
    for name, variant in variants.items():
        try:
            results[name] = Timed(0, 0, _warm_up(variant, device))
        except torch.OutOfMemoryError:
            results[name] = "out of memory"
        except Exception as error:
            # Inductor refuses GPUs below 7.0, by exceptions of several kinds; nothing else may fail.
            if name != "compiled":
                raise
            results[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    names = [name for name, found in results.items() if isinstance(found, Timed)]
    times: dict[str, list[float]] = {name: [] for name in names}
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    once = _once_on_cuda if device.type == "cuda" else _once_on_cpu
    for turn in range(rounds):
        start = turn % max(1, len(names))
        for name in names[start:] + names[:start]:
            times[name].append(once(variants[name], flush))
    for name in names:
        low, median, high = statistics.quantiles(times[name], n=4, method="inclusive")
        results[name] = results[name]._replace(median_us=median, iqr_us=high - low)
    return results


def _warm_up(variant: Variant, device: torch.device) -> int:
    """Run a few times; return the peak memory of the last one."""
    for _ in range(WARM_UP - 1):
        variant.run(variant.prepare())
    if device.type != "cuda":
        variant.run(variant.prepare())
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    variant.run(variant.prepare())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _once_on_cuda(variant: Variant, flush: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    state = variant.prepare()
    flush.zero_()
    torch.cuda._sleep(WAIT_CYCLES)
    start.record()
    variant.run(state)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _once_on_cpu(variant: Variant, _flush: torch.Tensor) -> float:
    state = variant.prepare()
    start = time.perf_counter()
    variant.run(state)
    return (time.perf_counter() - start) * 1e6


def copy_of(count: int, device: torch.device) -> Variant:
    """Make a copy that reads and writes `count` bytes in all: the ceiling of any op that moves as many."""
    source = torch.zeros(max(1, count // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Variant(lambda _: target.copy_(source))


def copy_bandwidth(device: torch.device, rounds: int, count: int = 2**30) -> float:
    """Measure the bytes per second of a large copy, read and written bytes together."""
    timed = time_variants({"copy": copy_of(count, device)}, rounds, device)["copy"]
    return count / (timed.median_us * 1e-6)


def matmul_rate(device: torch.device, rounds: int, side: int = 8192) -> float:
    """Measure the FLOP/s of a large float32 product, in TF32 where `torch.set_float32_matmul_precision` allows it."""
    a, b = torch.randn(2, side, side, device=device)
    timed = time_variants({"matmul": Variant(lambda _: a @ b)}, rounds, device)["matmul"]
    return 2 * side**3 / (timed.median_us * 1e-6)
