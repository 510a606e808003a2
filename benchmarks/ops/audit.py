"""Hold the machine code of every kernel against the bytes it has to move, at batch 1024 and ViT-B; no GPU needed.

    python benchmarks/ops/audit.py [--op NAME] [--arch 80 90] [--write FILE] [--dump FOLDER]

Three things come together: the launches that a public call of an op and its gradient make, with the bytes they ask for
(`traffic.py`, in Triton's interpreter); their machine code (`sass.py`); and the instructions a warp issues on its way
through that code (`sass_walk.py`; for sm_61 through PTX, `ptx_walk.py`). What is printed is a bound, no measurement: a
kernel cannot be faster than its instructions can be issued, nor than its bytes can be moved. Exit status 1 where the
first takes longer than the second without a reason in `REASONS`, or where a kernel spills.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import ptx_walk
import registry
import sass_walk
import triton
from ahead_of_time import source_of
from sass import Program, disassemble, loops, resident, usage
from triton.backends.compiler import GPUTarget

from ccmim_kernels.triton_impl.launch import Launch, compiler_options, type_of

BATCH = 1024


class Gpu(NamedTuple):
    """This class is what bounds a kernel: multiprocessors, clock in Hz, and bytes per second of a large copy."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float

    @property
    def issued(self) -> float:
        """Return warp instructions per second: each multiprocessor has four schedulers that issue one a cycle."""
        return self.multiprocessors * 4 * self.clock


# NVIDIA's data sheets (multiprocessors, boost clock). H200: 4.3 TB/s of its 4.8 are what large copies reach. Of the
# others all of the data sheet's, the strict choice, since less bandwidth leaves more time for instructions. sm_61 has
# counts of PTX instructions.
GPUS = {
    90: Gpu("H200", 132, 1.98e9, 4.3e12),
    80: Gpu("A100 80 GB", 108, 1.41e9, 2.0e12),
    61: Gpu("GTX 1080 Ti", 28, 1.582e9, 0.484e12),
}

# Kernels whose instructions may take longer than their bytes, and why.
REASONS: dict[str, str] = {
    "ccmim_logsumexp_kernel": "matrix products of 1024 x 1024 x 256 on 2 MB: bound by products, not by bytes",
    "ccmim_gradient_kernel": "matrix products of 1024 x 1024 x 256 on 3 MB: bound by products, not by bytes",
    "ccmim_hog_target_kernel": "40 of its 57 instructions a value vote: 8 comparisons, 9 sums; a histogram in shared "
    "memory would take fewer, which Triton cannot express",
    "ccmim_sample_partition_kernel": "4 MB in all, a few microseconds: 32 rounds of bisection, in registers",
}


class Audited(NamedTuple):
    """This class is the audit of one launch on one GPU.

    Attributes: the launch as `traffic.measure` describes it; its machine code; warp instructions a warp issues on
    average; how often a warp executes each width of global loads and of stores; barriers by loop; resident warps and
    what limits them.
    """

    row: dict[str, Any]
    program: Program
    instructions: float
    loads: Counter
    stores: Counter
    barriers: list[int]
    resident: int
    limit: str

    def issue_seconds(self, gpu: Gpu) -> float:
        return self.instructions * self.row["warps"] * self.row["programs"] / gpu.issued

    def byte_seconds(self, gpu: Gpu) -> float:
        return self.row["distinct"] / gpu.bandwidth

    def instructions_per_byte(self) -> float:
        """Return instructions of threads, 32 a warp, per byte that must be moved."""
        return 32 * self.instructions * self.row["warps"] * self.row["programs"] / self.row["distinct"]


def described(op: str) -> list[dict[str, Any]]:
    """Ask `traffic.py` for the launches of an op, in a process where Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__).with_name("traffic.py")), op, "--batch", str(BATCH)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def launch_of(row: dict[str, Any]) -> Launch:
    """Return the launch that `traffic.measure` describes, of the kernel that can be compiled."""
    kernel = getattr(importlib.import_module(row["module"]), row["kernel"])
    tensors = [isinstance(x, str) for x in row["arguments"]]
    types = (x if t else type_of(kernel, i, x) for i, (x, t) in enumerate(zip(row["arguments"], tensors)))
    numbers = (None if t else x for x, t in zip(row["arguments"], tensors))
    constants = tuple(sorted(row["constants"].items()))
    options = (row["warps"], row["fp_fusion"], row["registers"], row["programs"])
    return Launch(kernel, tuple(types), constants, *options, tuple(numbers))


def audit(row: dict[str, Any], architecture: int, dump: Path | None = None) -> Audited:
    """Compile a launch for an architecture (80: sm_80), and follow its warps."""
    launch = launch_of(row)
    options = compiler_options(launch.warps, launch.fp_fusion, launch.registers, architecture)
    built = triton.compile(source_of(launch), target=GPUTarget("cuda", architecture, 32), options=options)
    if dump:
        (dump / f"{row['kernel']}.sm_{architecture}.cubin").write_bytes(built.asm["cubin"])
        (dump / f"{row['kernel']}.sm_{architecture}.ttgir").write_text(built.asm["ttgir"])
    # The first, the last and some programs between: the last ones of an image may have less to do.
    programs = sorted({launch.programs * part // 8 for part in range(8)} | {launch.programs - 1})
    places = [(index, 32 * warp) for index in programs for warp in range(launch.warps)]
    if architecture < 70:
        found = usage(built.asm["cubin"])
        program = Program([], found["REG"], found["STACK"] + found["LOCAL"], built.metadata.shared)
        listing = ptx_walk.Program(built.asm["ptx"])
        walks = [ptx_walk.path(listing, launch.arguments, launch.numbers, *place) for place in places]
        accesses = listing.accesses()
    else:
        program = disassemble(built.asm["cubin"], built.metadata.shared)
        bank = sass_walk.argument_bank(architecture, launch.arguments, launch.numbers)
        walks = [sass_walk.path(program, bank, *place) for place in places]
        accesses = [(x.access, x.width) for x in program.code]
    issued = sum(walks, Counter())
    memory = {"load": Counter(), "store": Counter(), "": Counter()}
    for index, times in issued.items():
        kind, width = accesses[index]
        memory[kind][width] += times / len(walks)
    barriers = [sum(x.kind == "BAR" for x in program.code[a : b + 1]) for a, b in loops(program.code)]
    fits = resident(architecture, launch.warps, program.registers, program.shared)
    return Audited(row, program, issued.total() / len(walks), memory["load"], memory["store"], barriers, *fits)


def widths(found: Counter) -> str:
    return ", ".join(f"{times:.3g} x {width}" for width, times in sorted(found.items(), reverse=True)) or "-"


HEAD = [
    "kernel", "pass", "instr / warp", "instr / byte", "issue, us", "bytes, us", "issue / bytes", "moved / needed",
    "loads x bytes", "stores x bytes", "barriers in loops", "warps (limit)", "registers", "spill",
]  # fmt: skip


def line(found: Audited, gpu: Gpu) -> str:
    """Format one row of the table."""
    issue, move = found.issue_seconds(gpu) * 1e6, found.byte_seconds(gpu) * 1e6
    cells = [
        f"`{found.row['kernel'].removeprefix('ccmim_').removesuffix('_kernel')}`",
        found.row["pass"],
        f"{found.instructions:.0f}",
        f"{found.instructions_per_byte():.2f}",
        f"{issue:.1f}",
        f"{move:.1f}",
        f"{issue / move:.0%}",
        f"{found.row['moved'] / found.row['distinct']:.2f}",
        widths(found.loads),
        widths(found.stores),
        " ".join(map(str, found.barriers)) or "-",
        f"{found.resident} ({found.limit})",
        str(found.program.registers),
        str(found.program.spilled or "-"),
    ]
    return f"| {' | '.join(cells)} |"


def complaints(found: Audited, gpu: Gpu, architecture: int) -> list[str]:
    """List what is wrong with a launch: spills, or instructions that take longer than bytes without a reason."""
    name, wrong = f"{found.row['kernel']} sm_{architecture}", []
    share = found.issue_seconds(gpu) / found.byte_seconds(gpu)
    if share > 1 and found.row["kernel"] not in REASONS:
        wrong.append(f"{name}: its instructions take {share:.0%} of the time of its bytes, at most 100 % or a reason")
    if found.program.spilled:
        wrong.append(f"{name}: spills {found.program.spilled} bytes a thread")
    return wrong


def floor_line(op: str, rows: list[dict[str, Any]]) -> list[str]:
    """Hold the bytes of an op's launches against its floor, by pass."""
    floors, size = [], registry.Size(BATCH)
    for name, work in registry.benchmark(op).floor(size).items():
        mine = [row for row in rows if row["pass"] == name]
        if mine:
            needed, moved = (sum(row[key] for row in mine) for key in ("distinct", "moved"))
            cells = (work.bytes / 1e6, needed / 1e6, moved / 1e6)
            figures = " | ".join(f"{x:.1f}" for x in cells)
            floors.append(f"| `{op}` | {name} | {figures} | {needed / work.bytes:.2f} | {moved / work.bytes:.2f} |")
    return floors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="*", default=registry.NAMES, choices=registry.NAMES)
    parser.add_argument("--arch", nargs="*", type=int, default=list(GPUS), choices=list(GPUS))
    parser.add_argument("--write", type=Path, help="write the tables to this file")
    parser.add_argument("--dump", type=Path, help="a folder for the compiled kernels")
    options = parser.parse_args()
    if options.dump:
        options.dump.mkdir(parents=True, exist_ok=True)
    rows = {op: described(op) for op in options.op}
    text, wrong = [f"Triton {triton.__version__}, batch {BATCH}, ViT-B/16 at 224 x 224, bfloat16."], []
    for architecture in options.arch:
        gpu = GPUS[architecture]
        text += [f"\nsm_{architecture}: {gpu.name}, {gpu.multiprocessors} x 4 x {gpu.clock / 1e9:.2f} G warp "]
        text[-1] += f"instructions a second, {gpu.bandwidth / 1e12:.1f} TB/s.\n"
        text += [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
        for row in (row for op in options.op for row in rows[op]):
            found = audit(row, architecture, options.dump)
            text.append(line(found, gpu))
            wrong += complaints(found, gpu, architecture)
    text += ["\n| op | pass | floor, MB | needed, MB | moved, MB | needed / floor | moved / floor |", "|---" * 7 + "|"]
    text += [x for op in options.op for x in floor_line(op, rows[op])]
    text += ["", *(f"- `{name}`: {why}" for name, why in REASONS.items())]
    print("\n".join(text))
    if options.write:
        options.write.write_text("\n".join(text) + "\n")
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
