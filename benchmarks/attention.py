"""Time every attention backend at the lengths of our passes, which a run does itself for its own alone.

    ccmim bench attention [--device cuda] [--batch 16] [--threads 2] [--rounds 7] [--out PREFIX]

Backends take turns within a round; figures are medians over rounds, forward alone and with the backward pass. A backend
the device lacks is left out. Writes benchmarks/results/attention-<date>-<device>.json and .md.
"""

# B batch, T tokens, N heads, H head dim

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pages
import torch

from ccmim_fast.models.block import BACKENDS, CUDA_ONLY, attention
from ccmim_fast.profile.meter import synchronise

# Tokens, heads, head dim: ViT-B's visible set, masked set and whole image, MAE's decoder; then longer sequences.
SHAPES = [(50, 12, 64), (148, 12, 64), (197, 12, 64), (197, 16, 32), (401, 12, 64), (785, 12, 64)]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse(arguments: list[str]) -> argparse.Namespace:
    made = argparse.ArgumentParser("ccmim bench attention", description=__doc__.split("\n")[0])
    # One line for a mistake, as everywhere in `ccmim`.
    made.error = lambda message: made.exit(2, f"ccmim: {made.prog}: {message}\n")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--threads", type=int, default=2, help="of a CPU")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=[])
    made.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of them, from the shortest on")
    made.add_argument("--out", type=Path, help="path of the results, without a suffix")
    options = made.parse_args(arguments)
    options.dtype = options.dtype or (["fp32", "fp16", "bf16"] if options.device == "cuda" else ["fp32", "bf16"])
    return options


def seconds(run: Callable[[], object], device: torch.device, repeat: int) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    synchronise(device)
    return (time.perf_counter() - start) / repeat


def passes(backend: str, qkv: torch.Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward pass without gradient, and both passes."""

    def forward() -> None:
        with torch.no_grad():
            attention(*qkv.unbind(2), backend=backend)

    def both() -> None:
        out = attention(*qkv.unbind(2), backend=backend)
        torch.autograd.grad(out, qkv, out.detach())

    return forward, both


def row(shape: tuple[int, int, int], dtype: str, options: argparse.Namespace) -> dict:
    """Medians in milliseconds of every backend the device has, at one shape."""
    device, (T, N, H) = torch.device(options.device), shape
    # As the fused projection of a block leaves them: [B, T, 3, N, H].
    qkv = torch.randn(options.batch, T, 3, N, H, device=device, dtype=DTYPES[dtype], requires_grad=True)
    candidates, missing = {}, {}
    for backend in BACKENDS:
        if backend in CUDA_ONLY and device.type != "cuda":
            continue
        try:
            for run in passes(backend, qkv):
                run()
            candidates[backend] = passes(backend, qkv)
        except (RuntimeError, ImportError, NotImplementedError) as error:
            missing[backend] = str(error).strip().splitlines()[0]
    repeat = 20 if device.type == "cuda" else 1
    times = {backend: ([], []) for backend in candidates}
    for _ in range(options.rounds):
        for backend, runs in candidates.items():
            for found, run in zip(times[backend], runs):
                found.append(1e3 * seconds(run, device, repeat))
    medians = {backend: [statistics.median(found) for found in both] for backend, both in times.items()}
    return {
        "tokens": T,
        "heads": N,
        "head_dim": H,
        "dtype": dtype,
        "forward_ms": {backend: both[0] for backend, both in medians.items()},
        "both_ms": {backend: both[1] for backend, both in medians.items()},
        "best": min(medians, key=lambda backend: medians[backend][1]),
        "missing": missing,
    }


def body(rows: list[dict]) -> str:
    """Markdown: forward / forward and backward, milliseconds."""
    backends = [backend for backend in BACKENDS if any(backend in r["both_ms"] for r in rows)]

    def cell(r: dict, backend: str) -> str:
        if backend not in r["both_ms"]:
            return "-"
        return f"{r['forward_ms'][backend]:.2f} / {r['both_ms'][backend]:.2f}"

    lines = [
        [f"{r['tokens']} x {r['heads']} x {r['head_dim']}", r["dtype"], *(cell(r, b) for b in backends), r["best"]]
        for r in rows
    ]
    return pages.table(lines, ["tokens x heads x head dim", "dtype", *backends, "best of both"])


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = [row(shape, dtype, options) for dtype in options.dtype for shape in SHAPES[: options.shapes]]
    options.precision = "-".join(options.dtype)
    result = {"environment": pages.environment("attention", arguments, options), "batch": options.batch, "rows": rows}
    notes = (
        f"Batch {options.batch}, medians of {options.rounds} interleaved rounds, milliseconds: forward / both passes."
    )
    prefix = pages.prefix_of("attention", options, result["environment"])
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{prefix}.md").write_text(pages.page("Attention", result, notes, body(rows)))
    print(f"\n{body(rows)}\n\n{prefix}.md, .json")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
