"""Time every op as Triton kernels, eager reference and compiled reference, beside a copy of as many bytes.

    python benchmarks/ops/bench.py [--op NAME ...] [--batch B ...] [--width D ...] [--out PREFIX]

An op's own tests come first: where they are red nothing is said of it, and the exit status is 1. Writes
benchmarks/results/ops-<date>-<device>.json, .md and .png. Without a GPU it prints what each op has to move.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import registry
import report
import timing
import torch
from registry import Case, Size, Work, by_width
from timing import Timed, Variant

from ccmim_kernels.triton_impl.launch import INTERPRETED

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TESTS = (sys.executable, "-m", "pytest", "-q")
KERNELS = ("triton", "reference", "compiled")
BATCHES, WIDTHS = (32, 128, 1024), (384, 768, 1024)  # widths of ViT-S, B and L
LEAST_ROUNDS = 20


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("ccmim bench ops", description=__doc__.split("\n")[0])
    # One line for a mistake, as everywhere in `ccmim`.
    parser.error = lambda message: parser.exit(2, f"ccmim: {parser.prog}: {message}\n")
    parser.add_argument("--op", nargs="+", default=registry.NAMES, choices=registry.NAMES)
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES), help="images")
    parser.add_argument("--width", nargs="+", type=int, default=list(WIDTHS), help="of the encoder")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="cpu: a smoke test")
    parser.add_argument("--rounds", type=int, default=30, help=f"at least {LEAST_ROUNDS} on CUDA")
    parser.add_argument("--no-tests", action="store_true", help="refused on CUDA")
    parser.add_argument("--out", type=Path, help="path of the results, without a suffix")
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s, of floors without a GPU (an H100)")
    parser.add_argument("--tflops", type=float, default=494, help="likewise (TF32 of an H100 SXM, data sheet)")
    parser.add_argument("--resources", action="store_true", help="compile every kernel ahead of time (minutes)")
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "none"
    elif options.device == "cuda" and not torch.cuda.is_available():
        options.device = "none"
    if options.device == "cuda":
        if options.no_tests:
            parser.error("--no-tests: not on CUDA, where no time is given without green tests")
        if options.rounds < LEAST_ROUNDS:
            parser.error(f"--rounds={options.rounds} must be at least {LEAST_ROUNDS} on CUDA")
        if INTERPRETED:
            parser.error("TRITON_INTERPRET is set: that is Python, not kernels; unset it")
    if options.device == "cpu" and "triton" in options.kernels:
        parser.error("--device=cpu: Triton kernels run on CUDA; add --kernels reference")
    if options.rounds < 2:
        parser.error(f"--rounds={options.rounds} must be at least 2")
    return options


def sizes(op: str, options: argparse.Namespace) -> list[Size]:
    """List the sizes an op is measured at: one width where the op does not depend on it."""
    widths = options.width if by_width(op) else options.width[:1]
    return [Size(batch, width) for batch in options.batch for width in widths]


def tests_are_green(op: str) -> bool:
    """Run the op's tests in a process of their own; the tests' output is shown where they fail."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [*TESTS, f"tests/ops/test_{op}.py"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        print(f"{done.stdout[-2000:]}{done.stderr[-2000:]}\n{op}: its tests fail, so it is not timed", file=sys.stderr)
    return done.returncode == 0


def implementations(case: Case, kernels: list[str]) -> dict[str, Callable[[], tuple]]:
    """Return the op's forward pass at one size, by name."""
    calls = {}
    for name in kernels:
        call = functools.partial(case.call, kernels="triton" if name == "triton" else "reference")
        call = torch.compile(call, dynamic=False) if name == "compiled" else call
        calls[name] = functools.partial(call, *case.inputs)
    return calls


def variant_of(call: Callable[[], tuple], which: str, leaves: tuple, grad: torch.Tensor) -> Variant:
    """Return what is timed of one pass; `backward` is prepared by the forward pass."""

    def backward(out):
        return torch.autograd.grad(out[0], leaves, grad)

    if which == "forward":
        return Variant(lambda _: call())
    if which == "backward":
        return Variant(backward, call)
    return Variant(lambda _: backward(call()))


def measure(op: str, size: Size, options: argparse.Namespace, roofs: tuple[float, float]) -> list[dict]:
    """Measure every pass of an op at one size: a row each."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    torch._dynamo.reset()
    case, rows = registry.benchmark(op).case(size, device), []
    calls = implementations(case, options.kernels)
    # As large as the output: the gradient of `out.sum()` would be a broadcast scalar, no bytes to read.
    grad = torch.randn_like(case.call(*case.inputs, kernels="reference")[0])
    for which, work in registry.benchmark(op).floor(size).items():
        variants = {name: variant_of(call, which, case.leaves, grad) for name, call in calls.items()}
        variants["copy"] = timing.copy_of(work.bytes, device)
        rows.append(row_of(op, size, which, work, timing.time_variants(variants, options.rounds, device), roofs))
    return rows


def row_of(
    op: str, size: Size, which: str, work: Work, timed: dict[str, Timed | str], roofs: tuple[float, float]
) -> dict:
    """Return one row of the result: what had to be done, and how long each implementation took."""
    floor_us = work.seconds(*roofs) * 1e6
    found = {}
    for name, value in timed.items():
        if isinstance(value, str):
            found[name] = {"error": value}
            continue
        share = floor_us / value.median_us
        times = {"median_us": value.median_us, "iqr_us": value.iqr_us}
        found[name] = times | {"share_of_floor": share, "peak_mb": value.peak_bytes / 1e6}
    width = size.width if by_width(op) else None
    at = {"op": op, "batch": size.batch, "width": width, "pass": which}
    return at | {"bytes": work.bytes, "flops": work.flops, "floor_us": floor_us, "variants": found}


def floors_only(options: argparse.Namespace) -> str:
    """Tell bytes, FLOPs and floors of all sizes, at a nominal bandwidth and rate."""
    roofs = (options.bandwidth * 1e12, options.tflops * 1e12)
    rows = []
    for op in options.op:
        for size in sizes(op, options):
            for which, work in registry.benchmark(op).floor(size).items():
                width = str(size.width) if by_width(op) else ""
                figures = [f"{work.bytes / 1e6:.1f}", f"{work.flops / 1e9:.2f}", f"{work.seconds(*roofs) * 1e6:.1f}"]
                rows.append([f"`{op}`", str(size.batch), width, which, *figures])
    return report.table(rows, ["op", "B", "width", "pass", "MB", "GFLOP", "floor, us"])


def without_gpu(options: argparse.Namespace) -> int:
    """Say what can be said without a GPU; return the exit status of the ahead-of-time compilation, if asked for."""
    print("No CUDA device: times, their spread, peak memory and the copy's bandwidth cannot be measured here.\n")
    floors = f"Floors at {options.bandwidth} TB/s and {options.tflops:g} TFLOP/s (nominal):\n\n{floors_only(options)}\n"
    print(floors)
    if options.out is not None:
        facts = report.facts(report.environment(torch.device("cpu")))
        options.out.with_name(options.out.name + ".md").write_text(
            f"# Ops: what each has to move\n\n{facts}\n\n{floors}"
        )
    script = Path(__file__).with_name("ahead_of_time.py")
    if not options.resources:
        print(f"Registers, spills and shared memory for nine architectures: {script.relative_to(ROOT)} (minutes)")
        return 0
    path = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, script, "--op", *options.op], env={**os.environ, "PYTHONPATH": path}
    ).returncode


def prefix_of(out: Path | None, environment: dict[str, str]) -> Path:
    """Choose where the results go: `out`, or a name made of date and device; never over another measurement."""
    if out is not None:
        return out
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    base = RESULTS / f"ops-{environment['date']}-{device}"
    prefix, count = base, 1
    while prefix.with_name(prefix.name + ".json").exists():
        count += 1
        prefix = base.with_name(f"{base.name}-{count}")
    return prefix


def write(result: dict, prefix: Path) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", report.markdown(result))):
        prefix.with_name(prefix.name + suffix).write_text(text)
    report.plot(result, prefix.with_name(prefix.name + ".png"))


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "none":
        return without_gpu(options)
    device = torch.device(options.device)
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        torch.set_float32_matmul_precision("high")  # as the trainer does
    small = {} if device.type == "cuda" else {"count": 2**20}
    bandwidth = timing.copy_bandwidth(device, options.rounds, **small)
    rate = timing.matmul_rate(device, options.rounds, **({} if device.type == "cuda" else {"side": 64}))
    result = {
        "environment": report.environment(device),
        "rounds": options.rounds,
        "tests": "not run" if options.no_tests else "green",
        "copy_tb_per_s": bandwidth / 1e12,
        "matmul_tflop_per_s": rate / 1e12,
        "rows": [],
    }
    prefix, red = prefix_of(options.out, result["environment"]), []
    for op in options.op:
        if not options.no_tests and not tests_are_green(op):
            red.append(op)
            continue
        rows = [row for size in sizes(op, options) for row in measure(op, size, options, (bandwidth, rate))]
        result["rows"] += rows
        print(report.measured_table(rows), end="\n\n", flush=True)
        # After each op, so that a run that is cut off has something to show.
        write(result, prefix)
    if result["rows"]:
        print(f"{prefix}.md, .json, .png")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
