"""How a step's time grows with the batch, the image and the width, beside how its arithmetic grows.

    python benchmarks/growth.py [--precision bf16] [--rounds 7] [--out PREFIX]

Whole AdamW steps of ccMIM (score `all`, 2 decoder blocks) on made images already in memory, on the CPU or GPU at hand,
in interleaved rounds. Writes benchmarks/results/<date>-growth-<device>.md and .png, or PREFIX.md and .png. Figures are
relative to ViT-S/16, 224 pixels, 8 images: the absolute ones say more about the machine.
"""

import argparse
import datetime
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from arithmetic import Vit, config_of, lines, parts

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "ops"))
from timing import Timed, Variant, time_variants  # noqa: E402

from ccmim_fast.data.stream.batch import Batch  # noqa: E402
from ccmim_fast.engine.build import build_step  # noqa: E402
from ccmim_fast.models.precision import choose_precision  # noqa: E402
from ccmim_fast.ranks.session import Session  # noqa: E402
from ccmim_fast.runs.folder import environment  # noqa: E402

WIDTHS = {"Ti": ("vit_tiny_patch16_224", 192), "S": ("vit_small_patch16_224", 384), "B": ("vit_base_patch16_224", 768)}


class Point(NamedTuple):
    """One measured size: `images` of `pixels` a side by ViT-`size`."""

    size: str
    pixels: int
    images: int

    @property
    def vit(self) -> Vit:
        arch, width = WIDTHS[self.size]
        return Vit(arch, width, 12, image=self.pixels)

    @property
    def flops(self) -> float:
        """Of a step."""
        return self.images * sum(parts(self.vit, "all", 2).values())


BASE = Point("S", 224, 8)
SERIES = {
    "batch": [BASE._replace(images=images) for images in (2, 4, 8, 16, 32)],
    "pixels a side": [BASE._replace(pixels=pixels) for pixels in (96, 160, 224, 320)],
    "encoder": [BASE._replace(size=size) for size in WIDTHS],
}


def step_of(point: Point, precision: str, device: torch.device) -> Variant:
    """A whole optimizer step of this size."""
    run = build_step(config_of(point.vit, "all", 2, precision=precision), Session(0, 1, device))
    shape = (point.images, point.pixels, point.pixels, 3)
    images_BHWC = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    ids_B = torch.arange(point.images, device=device)
    batch = Batch(images_BHWC, ids_B, torch.zeros_like(ids_B))
    return Variant(lambda _: run([batch], 1e-4))


def measure(precision: str, rounds: int, device: torch.device) -> dict[Point, Timed]:
    points = list(dict.fromkeys(point for series in SERIES.values() for point in series))
    found = time_variants({str(p): step_of(p, precision, device) for p in points}, rounds, device)
    missing = {name: why for name, why in found.items() if isinstance(why, str)}
    if missing:
        raise SystemExit(f"could not run: {missing}")
    return {point: found[str(point)] for point in points}


def value_of(name: str, point: Point) -> str:
    return {"batch": str(point.images), "pixels a side": str(point.pixels), "encoder": f"ViT-{point.size}"}[name]


def table(found: dict[Point, Timed]) -> str:
    """Per image: arithmetic and time against those of `BASE`; the rate is FLOP/s against those of `BASE`."""
    base = found[BASE].median_us / BASE.images
    rows = []
    for name, series in SERIES.items():
        for point in series:
            flops = point.flops / point.images / (BASE.flops / BASE.images)
            time = found[point].median_us / point.images / base
            spread = found[point].iqr_us / found[point].median_us
            patches, rate = str(point.vit.patches), flops / time
            cells = (patches, f"{flops:.2f}", f"{time:.2f}", f"{spread:.0%}", f"{rate:.2f}")
            rows.append([f"{name} {value_of(name, point)}", *cells])
    return lines(["", "patches", "FLOP per image", "time per image", "IQR / median", "rate"], rows)


def plot(found: dict[Point, Timed], path: Path) -> None:
    """Time per image against what varies; the line is its arithmetic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    base_time, base_flops = found[BASE].median_us / BASE.images, BASE.flops / BASE.images
    for axes, (name, series) in zip(figure.subplots(1, len(SERIES)), SERIES.items()):
        places = [value_of(name, point) for point in series]
        axes.plot(places, [p.flops / p.images / base_flops for p in series], "k-", label="FLOP per image")
        axes.plot(places, [found[p].median_us / p.images / base_time for p in series], "o", label="time per image")
        axes.set(xlabel=name, ylim=(0, None))
        axes.legend(fontsize=8, loc="lower right")
    figure.supylabel("relative to ViT-S, 224 pixels, 8 images", fontsize=9)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "fp16", "bf16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="prefix of the two files")
    chosen = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = environment(device)
    found = measure(chosen.precision, chosen.rounds, device)
    slug = re.sub(r"\W+", "-", facts["device"]).strip("-").lower() if device.type == "cuda" else "cpu"
    today = datetime.date.today().isoformat()
    prefix = chosen.out or ROOT / "benchmarks" / "results" / f"{today}-growth-{slug}"
    precision = choose_precision(chosen.precision, device).name
    text = (
        f"# How a step grows\n\n{facts['device']}, {torch.get_num_threads()} threads, torch {facts['torch']}, "
        f"{precision}, {today}, commit {facts['commit']}. ccMIM, score `all`, 2 decoder blocks, whole AdamW steps on "
        f"images in memory; medians of {chosen.rounds} interleaved rounds. All figures are relative to ViT-S/16, "
        f"224 pixels, 8 images.\n\n{table(found)}\n\n![time per image]({prefix.name}.png)\n"
    )
    prefix.with_suffix(".md").write_text(text)
    plot(found, prefix.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
