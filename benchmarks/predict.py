"""Predict the time of a step on a GPU from what it launches, moves and computes: counted, not measured.

    python benchmarks/predict.py

Each step runs on a device that computes nothing (tests/nullgpu/). Launches, products and their FLOPs are counted by the
device; bytes of the other work are those of each operator's inputs and outputs (of each fused kernel's, as inductor
counts them, where the step is compiled). A step takes as long as

    products / rate + attention / rate + bytes / bandwidth, or launches x the host's time for one, if that is longer.

The rates are assumptions, written below with their sources, and nobody has measured the result.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import pages

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from nullgpu.null_device import end_of, run  # noqa: E402 (its folder is no package)

# Seconds of the host per launch: of an eager operator, with its part in autograd; of a compiled graph's.
EAGER, COMPILED = 6e-6, 2.5e-6


class Gpu(NamedTuple):
    """A GPU as it is assumed to be: FLOP/s of large products and of attention, bytes/s of large copies."""

    name: str
    capability: int
    memory_gb: float
    products: float
    attention: float
    bandwidth: float


GPUS = {
    # 0.7 of the data sheet's 989 TFLOP/s in bf16; attention at these lengths at a quarter of it; 4.3 of 4.8 TB/s.
    "h200": Gpu("H200", 90, 141.0, 690e12, 170e12, 4.3e12),
    # 0.8 of 11.3 TFLOP/s in float32, attention at half of it; 0.85 of 484 GB/s.
    "1080ti": Gpu("GTX 1080 Ti", 61, 11.7, 9.0e12, 4.5e12, 0.41e12),
}
# Name: GPU, images of a micro-batch, settings.
STEPS = {
    "ccMIM, compiled": ("h200", 256, ["--config=ccmim_vit_base", "--train.compile=step"]),
    "ccMIM, eager": ("h200", 256, ["--config=ccmim_vit_base", "--train.compile=off"]),
    "MAE-2, compiled": (
        "h200",
        256,
        ["--config=mae_vit_base", "--decoder.depth=2", "--train.compile=step"],
    ),
    "MAE-8, compiled": ("h200", 256, ["--config=mae_vit_base", "--train.compile=step"]),
    "ccMIM": ("1080ti", 64, ["--config=ccmim_vit_base_1080ti"]),
}


class Counts(NamedTuple):
    """What one step of `images` images does on the device; attention and products in FLOPs."""

    images: int
    launches: int
    products: float
    attention: float
    bytes: float
    compiled: bool


def seconds(counts: Counts, gpu: Gpu) -> dict[str, float]:
    """Return the seconds of each part, and of the step: of the device's parts, or of the host's launches if longer."""
    parts = {
        "products": counts.products / gpu.products,
        "attention": counts.attention / gpu.attention,
        "bytes": counts.bytes / gpu.bandwidth,
    }
    host = counts.launches * (COMPILED if counts.compiled else EAGER)
    return parts | {"launches": host, "step": max(sum(parts.values()), host)}


def row(name: str, counts: Counts, gpu: Gpu) -> list[str]:
    """Return a line of the table."""
    took = seconds(counts, gpu)
    milliseconds = [f"{1e3 * took[part]:.1f}" for part in ("products", "attention", "bytes", "launches", "step")]
    flops = f"{(counts.products + counts.attention) / counts.images / 1e9:.1f}"
    moved = f"{counts.bytes / 1e9:.1f}"
    rate = f"{counts.images / took['step']:.0f}"
    return [f"{gpu.name}: {name}", str(counts.images), str(counts.launches), flops, moved, *milliseconds, rate]


HEADER = ["step", "images", "launches", "GFLOP/image", "GB", "products ms", "attention ms", "bytes ms", "launches ms"]
HEADER += ["step ms", "images/s"]


def main() -> int:
    rows = []
    for name, (gpu_name, images, settings) in STEPS.items():
        gpu = GPUS[gpu_name]
        script = ROOT / "tests" / "nullgpu" / "count_step.py"
        limits = {"capability": gpu.capability, "memory_gb": gpu.memory_gb, "timeout": 1800}
        # Inductor counts bytes as it compiles, not when it finds what it compiled before.
        result = run(script, str(images), *settings, **limits, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
        if "counts" not in result.told:
            raise SystemExit(f"{name}: {end_of(result)}")
        rows.append(row(name, Counts(**result.told["counts"]), gpu))
        print(" | ".join(rows[-1]), flush=True)
    print("\n" + pages.table(rows, HEADER))
    return 0


if __name__ == "__main__":
    sys.exit(main())
