"""Compile every kernel, in every configuration its launcher can choose, for every GPU generation; no GPU needed.

The launchers themselves are asked what they would launch (`triton_impl.launch.recorded`, tensors on the meta device),
so nothing is listed twice. Prints a table of registers, spills and shared memory; exit status 1 where a kernel does not
compile, wants more shared memory than there is, or spills.

    python benchmarks/ops/ahead_of_time.py [--op NAME] [--arch 61 90] [--write FILE]
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import registry
import triton
from sass import usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ccmim_kernels.triton_impl.launch import Launch, compiler_options

# Compute capability: kB of shared memory a program can have (CUDA C++ Programming Guide, technical specifications).
ARCHITECTURES = {61: 48, 70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


class Resources(NamedTuple):
    """This class counts what a program needs, as the cubin says.

    Attributes: registers per thread; bytes spilled per thread; bytes of shared memory.
    """

    registers: int
    spilled: int
    shared: int


def source_of(launch: Launch) -> ASTSource:
    """Return what Triton compiles for a launch: types, constants, and what is a multiple of 16."""
    names = list(launch.kernel.arg_names)
    constants = dict(launch.constants)
    signature, attributes = {}, {}
    for index, kind in enumerate(launch.arguments):
        kind, _, special = kind.partition(":")
        if special == "1":
            constants[names[index]] = 1
            continue
        signature[names[index]] = kind
        if kind.startswith("*") or special == "16":
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in names}
    return ASTSource(launch.kernel, ordered, {(names.index(n),): v for n, v in constants.items()}, attributes)


def compile_for(launch: Launch, architecture: int) -> Resources:
    """Compile for one compute capability (61: sm_61)."""
    options = compiler_options(launch.warps, launch.fp_fusion, launch.registers, architecture)
    built = triton.compile(source_of(launch), target=GPUTarget("cuda", architecture, 32), options=options)
    found = usage(built.asm["cubin"])
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], built.metadata.shared)


def describe(launch: Launch) -> str:
    """Name a variant in one line: its types and constants, as far as they vary."""
    types = dict.fromkeys(kind for kind in launch.arguments if kind in ("*fp16", "*bf16", "*u8"))
    specialised = any(not p.do_not_specialize for p, k in zip(launch.kernel.params, launch.arguments) if k[0] == "i")
    aligned = any(kind.endswith(":16") for kind in launch.arguments)
    unaligned = "unaligned" if specialised and not aligned else ""
    constants = [f"{name}={value}" for name, value in launch.constants]
    return " ".join([*(kind[1:] for kind in types), *filter(None, [unaligned]), *constants, f"warps={launch.warps}"])


def _work(job: tuple[str, int, int]) -> tuple[str, int, int, Resources | str]:
    op, index, architecture = job
    try:
        return op, index, architecture, compile_for(registry.launches(op)[index], architecture)
    except Exception as error:
        return op, index, architecture, f"{type(error).__name__}: {str(error).strip()[-300:]}"


def compile_all(ops: list[str], architectures: list[int]) -> Iterator[tuple[Launch, int, Resources | str]]:
    """Compile every launch of `ops` for every architecture, in parallel; yield a string where one failed."""
    jobs = [(op, i, a) for op in ops for i in range(len(registry.launches(op))) for a in architectures]
    # Fresh processes: a fork would inherit the locks of torch's threads.
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for op, index, architecture, found in pool.imap(_work, jobs, chunksize=4):
            yield registry.launches(op)[index], architecture, found


def table(results: dict[Launch, dict[int, Resources | str]], architectures: list[int]) -> str:
    """Format Markdown, one row per kernel variant; a cell is registers, bytes of shared memory, and spills if any."""
    lines = ["| kernel | variant | " + " | ".join(f"sm_{a}" for a in architectures) + " |"]
    lines.append("|---" * (2 + len(architectures)) + "|")
    for launch, found in results.items():
        cells = [_cell(found[a]) for a in architectures]
        lines.append(f"| {launch.kernel.__name__} | {describe(launch)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: Resources | str) -> str:
    if isinstance(found, str):
        return "FAILED"
    return f"{found.registers} · {found.shared}" + (f" · SPILL {found.spilled}" if found.spilled else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="*", default=registry.NAMES, choices=registry.NAMES)
    parser.add_argument("--arch", nargs="*", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--write", type=Path, help="write the table to this file")
    options = parser.parse_args()
    results: dict[Launch, dict[int, Resources | str]] = {}
    wrong = []
    for launch, architecture, found in compile_all(options.op, options.arch):
        results.setdefault(launch, {})[architecture] = found
        name = f"{launch.kernel.__name__} ({describe(launch)}) sm_{architecture}"
        if isinstance(found, str):
            wrong.append(f"{name}: {found}")
        elif found.shared > ARCHITECTURES[architecture] * 1024:
            wrong.append(
                f"{name}: wants {found.shared} bytes of shared memory, there are {ARCHITECTURES[architecture]} kB"
            )
        elif found.spilled:
            wrong.append(f"{name}: spills {found.spilled} bytes a thread")
    text = (
        f"Triton {triton.__version__}. Registers per thread · bytes of shared memory.\n\n{table(results, options.arch)}"
    )
    print(text)
    if options.write:
        options.write.write_text(text + "\n")
    count = len(results) * len(options.arch)
    print(f"{count - len(wrong)} of {count} compiled without a spill", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
