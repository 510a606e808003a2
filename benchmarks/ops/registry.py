"""This module finds the benchmark of every op, and holds what these benchmarks share.

The benchmark of an op is the file of its name beside this one:

    floor(size) -> Passes          what the op has to move at least: every byte it needs read once, every byte it gives
                                   written once; and the FLOPs of its matrix products
    case(size, device) -> Case     what it is called with in a measurement: made inputs of real sizes
    launches() -> None             launches of the op's kernels, in every configuration its launchers can choose

A floor is a bound for any implementation, not a count of what ours moves. `backward` assumes that forward kept what is
smallest to keep; `both` that forward and backward share whatever can be shared, so it may be less than their sum.
"""

# B batch, N all ranks' rows, L patches, K visible, M masked, P prefix tokens, D width, E embedding dim, C channels

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

import ccmim_kernels
from ccmim_kernels.triton_impl.launch import Launch, recorded

HALF, FULL, ID, BYTE = 2, 4, 8, 1  # bytes of bf16, float32, int64, and of uint8 or bool

_KERNELS = Path(ccmim_kernels.__file__).parent / "triton_impl"
NAMES = sorted({path.stem for path in _KERNELS.glob("*.py")} - {"__init__", "launch"})


def benchmark(op: str) -> ModuleType:
    """Import the benchmark of an op."""
    return importlib.import_module(op)


@functools.cache
def launches(op: str) -> tuple[Launch, ...]:
    """List every distinct launch of an op, in a fixed order: recorded, so nothing is executed."""
    with recorded(run=False) as found:
        benchmark(op).launches()
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Size:
    """This class holds the sizes of a measurement: ViT/16 at 224 x 224, a quarter visible (MAE).

    Attributes:
        batch: B.
        width: D of the encoder, 384, 768 or 1024 for ViT-S, B, L.
        keys: N of `info_nce`; 0: N = B, one rank.
        grid: rows and columns of patches.
        decoder_width: D of `restore_tokens`.
        patch: pixels per side.
        cell, bins: of `hog_target` (MaskFeat).
        tokens: share of the masked set that the teacher sees (`teacher.tokens`).
    """

    batch: int
    width: int = 768
    keys: int = 0
    grid: tuple[int, int] = (14, 14)
    prefix: int = 1
    decoder_width: int = 512
    head_dim: int = 64
    embedding: int = 256
    patch: int = 16
    channels: int = 3
    cell: int = 8
    bins: int = 9
    tokens: float = 1.0

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def keep(self) -> int:
        return self.patches // 4

    @property
    def masked(self) -> int:
        return self.patches - self.keep

    @property
    def teacher(self) -> int:
        return max(1, round(self.masked * self.tokens))

    @property
    def pixels(self) -> int:
        """Count the values of one patch."""
        return self.patch**2 * self.channels


class Work(NamedTuple):
    """This class counts the work of one pass: bytes read and written, and FLOPs of its matrix products."""

    bytes: int
    flops: int = 0

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Return the floor: whichever takes longer."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


PASSES = ("forward", "backward", "both")
Passes = dict[str, Work]  # by the names of `PASSES`; an op without a gradient has "forward" alone


def separate(forward: int, backward: int) -> Passes:
    """Return the passes of an op whose backward shares nothing with its forward, from the bytes of each."""
    return {"forward": Work(forward), "backward": Work(backward), "both": Work(forward + backward)}


def by_width(op: str) -> bool:
    """Return True where the work of an op depends on the encoder's width."""
    floor = benchmark(op).floor
    return floor(Size(1, 384)) != floor(Size(1, 768))


class Case(NamedTuple):
    """This class is one op at one size.

    Attributes:
        call: `call(*inputs, kernels=..., **options)` gives the op's outputs, the differentiable one first.
        inputs: tensors.
        leaves: those of the inputs that receive a gradient; none: the op has no backward.
        variants: options of the op with which its kernels run in another configuration; they are not timed.
    """

    call: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...] = ()
    variants: tuple[dict, ...] = ()


def made(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """Make normal noise, a leaf that receives a gradient with `grad`."""
    return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)


def made_images(s: Size, device: torch.device) -> Tensor:
    """Make uint8 images [B, H, W, C]."""
    shape = (s.batch, s.grid[0] * s.patch, s.grid[1] * s.patch, s.channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def made_partition(s: Size, device: torch.device) -> ccmim_kernels.Partition:
    """Make a random partition of each image's patches, its tensors contiguous."""
    where = {"keep": s.keep, "grid": s.grid, "seed": 0, "epoch": 0, "strategy": "random", "kernels": "reference"}
    parts = ccmim_kernels.sample_partition(None, torch.arange(s.batch, device=device), **where)
    return ccmim_kernels.Partition(*(part.contiguous() for part in parts))


# What `launches` of the ops are made of.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (768, 100)  # a multiple of 16, for which Triton vectorises, and one that is not


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make a tensor of the meta device: a type and a shape, no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def ids(*shape: int) -> Tensor:
    """Make an int64 tensor of the meta device."""
    return empty(*shape, dtype=torch.int64)
