"""Every kernel launch goes through `launch`, so that launches can also be recorded: counted, or compiled ahead."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor


@triton.jit
def _probe():
    pass


# Triton decides when a kernel is decorated: with TRITON_INTERPRET=1 it runs on the CPU, in Python. For tests only.
INTERPRETED = not isinstance(_probe, triton.JITFunction)

# Patches (or tokens) a program holds in registers at once: the smallest of these that suffices. Few, so that few
# variants are compiled: lanes left over cost no memory traffic.
ROW_SIZES = (256, 1024, 2048)

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    """This class describes one launch. Two launches are equal if they run the same compiled kernel."""

    kernel: Any
    # Per run-time argument its Triton type; integers that are specialised on carry ":16" where they are a multiple of
    # 16 (Triton then vectorises), ":1" where they are 1 (a constant).
    arguments: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    fp_fusion: bool
    registers: int
    programs: int = field(compare=False)
    numbers: tuple[int | float | None, ...] = field(compare=False)  # the run-time arguments, None for a tensor


MOST_REGISTERS = 255  # of a thread; all there are: left to itself, ptxas spills some bytes to fit one more program


# Before Turing there are no uniform registers: what a warp's threads have in common, such as an address, takes some of
# each thread's. With 64 of them and 8 more `cls_row` still spills in Triton 3.6; with 16 more, 24 warps are resident
# instead of 32, which is enough for memories of less than 1 TB/s.
UNIFORM_REGISTERS_SINCE, INSTEAD_OF_UNIFORM = 75, 16


def compiler_options(warps: int, fp_fusion: bool, registers: int, architecture: int) -> dict[str, int | bool]:
    """Return the options of Triton's compiler for a launch on a compute capability (61: sm_61)."""
    more = 0 if architecture >= UNIFORM_REGISTERS_SINCE else INSTEAD_OF_UNIFORM
    most = min(registers + more, MOST_REGISTERS, 65536 // (32 * warps))
    return {"num_warps": warps, "enable_fp_fusion": fp_fusion, "maxnreg": most}


@cache
def architecture_of(device: torch.device) -> int:
    """Return the compute capability, 61 for sm_61; of a CPU, whose kernels are interpreted, a modern one."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


_recorders: list[tuple[list[Launch], bool]] = []


@contextmanager
def recorded(*, run: bool) -> Iterator[list[Launch]]:
    """Collect the launches made inside; with `run=False` nothing is executed (tensors may be on the meta device)."""
    launches: list[Launch] = []
    _recorders.append((launches, run))
    try:
        yield launches
    finally:
        _recorders.pop()


def launch(
    kernel: Any,
    programs: int,
    *arguments: Any,
    warps: int,
    fp_fusion: bool = False,
    registers: int = MOST_REGISTERS,
    **constants: Any,
) -> None:
    """Run `programs` instances of a kernel on the device of its first tensor; none launch nothing.

    Args:
        arguments: the kernel's run-time arguments, tensors first.
        warps: of 32 threads per program.
        fp_fusion: let the compiler contract a * b + c; off, so that results equal PyTorch's bit for bit.
        registers: a thread's at most; fewer let more programs fit on a multiprocessor. See `compiler_options`.
        constants: its `tl.constexpr` arguments.
    """
    if programs == 0:
        return
    if _recorders:
        types = tuple(type_of(kernel, index, value) for index, value in enumerate(arguments))
        numbers = tuple(None if isinstance(value, Tensor) else value for value in arguments)
        launches, run = _recorders[-1]
        options = (tuple(sorted(constants.items())), warps, fp_fusion, registers)
        launches.append(Launch(kernel, types, *options, programs, numbers))
        if not run:
            return
    devices = {str(x.device) for x in arguments if isinstance(x, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"tensors are on {', '.join(sorted(devices))}, expected one device")
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(arguments[0]):
        compiled_with = compiler_options(warps, fp_fusion, registers, architecture_of(arguments[0].device))
        kernel[(programs,)](*arguments, **compiled_with, **constants)


def fitting(sizes: tuple[int, ...], length: int, what: str) -> int:
    """Return the first of the ascending `sizes` that holds `length`; ValueError past the last."""
    for size in sizes:
        if length <= size:
            return size
    raise ValueError(f"{what}={length} must be at most {sizes[-1]} for kernels=triton; use kernels=reference")


def tile_for(width: int) -> dict[str, int]:
    """Return TOKENS, BLOCK_D and warps of a kernel that moves rows of `width` values: tiles of TOKENS x BLOCK_D.

    16 values a thread, read in pieces of 16 bytes. Rows that are no multiple of 16 values are read value by value, each
    with an address of its own: four a thread, or registers run out.
    """
    return {"TOKENS": 16 if width % 16 == 0 else 4, "BLOCK_D": 256, "warps": 8}


def rows_contiguous(x: Tensor) -> Tensor:
    """Return `x` itself if its last dimension has stride 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def checked_ids(ids: Tensor, count: int) -> Tensor:
    """Return indices, contiguous, for a kernel that reads what they point at. Raises IndexError on a CPU, see below.

    Each must be in 0 .. count - 1. On a CPU, where the interpreter would read foreign memory and the process end by a
    signal, they are looked at. On CUDA that would cost a launch, or the host a wait: there it is the caller's contract,
    which every `Partition` keeps.
    """
    runs = ids.device.type == "cpu" and ids.numel() and (not _recorders or _recorders[-1][1])
    if runs and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise IndexError(f"ids are in {int(ids.min())}..{int(ids.max())}, must be in 0..{count - 1}")
    return ids.contiguous()


def type_of(kernel: Any, index: int, value: Any) -> str:
    """Return the Triton type of a run-time argument, as in `Launch.arguments`."""
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    parameter = kernel.params[index] if hasattr(kernel, "params") else None
    if parameter is None or parameter.do_not_specialize:
        return kind
    return f"{kind}:1" if value == 1 else f"{kind}:16" if value % 16 == 0 else kind
