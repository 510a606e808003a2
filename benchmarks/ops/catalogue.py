"""What every op launches, in every configuration its launcher can choose: recorded from the launchers, not listed."""

# B batch, L patches, K visible, M masked, D width

import functools
from collections.abc import Callable

import torch

from ccmim_kernels.launch import ROW_SIZES, Launch, recorded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (768, 100)  # a multiple of 16, for which Triton vectorises, and one that is not


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ids(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int64)


def sample_partition() -> None:
    from ccmim_kernels.sample_partition import triton_impl

    for size in ROW_SIZES:
        for strategy in ("importance_sampling", "block"):
            triton_impl.sample_partition(
                empty(2, size),
                ids(2),
                grid=(1, size),
                keep=size // 4,
                seed=0,
                epoch=0,
                strategy=strategy,
                noise="gumbel",
                temperature=1.0,
                block_min=16,
            )


OPS: dict[str, Callable[[], None]] = {"sample_partition": sample_partition}


@functools.cache
def launches(op: str) -> tuple[Launch, ...]:
    """Every distinct launch of an op, in a fixed order."""
    with recorded(run=False) as found:
        OPS[op]()
    return tuple(dict.fromkeys(found))
