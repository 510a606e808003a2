"""Our loaders beside torchvision's: images per second from files and from tars, and what our own Python costs.

    ccmim bench data [--root FOLDER] [--images 480] [--batch 64] [--image-size 224] [--threads 2] [--rounds 5]
                   [--device cpu]

Without `--root`, photographs of 500 x 375 pixels are cut from scikit-image's and written as JPEG. Loaders take turns,
each round in a process of its own that may use `--threads` cores; ratios are taken round by round. What is read lies in
the page cache: what is measured is the work, not a disk.
Writes benchmarks/results/data-<date>-<device>.json, .md and .png.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pages
import torch
from PIL import Image

from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.build import build_loader
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.made.photos import photo_path
from ccmim_fast.data.shard import write_shards
from ccmim_fast.profile.meter import synchronise

PEER = "torchvision"
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
SIZE, QUALITY, CLASSES = (500, 375), 90, 4  # of ImageNet's average file: 110 kB
SMALL = 320  # pixels of the shorter side in the tars made smaller; these images have 375
# Name: loader of ours, folder below the work place.
OURS = {
    "dali, files": ("dali", "files"),
    "dali, tars": ("dali", "tars"),
    "dali, tars of 320 pixels": ("dali", "small"),
    "torch, files": ("torch", "files"),
    "torch, tars": ("torch", "tars"),
}
# What of the first one's work is not DALI's: all but decoding and resizing; and that without the reading.
READING = "dali, files, nothing decoded"
PYTHON = "dali, bytes in memory, nothing decoded"


def parse(arguments: list[str]) -> argparse.Namespace:
    made = argparse.ArgumentParser("ccmim bench data", description=__doc__.split("\n")[0])
    # One line for a mistake, as everywhere in `ccmim`.
    made.error = lambda message: made.exit(2, f"ccmim: {made.prog}: {message}\n")
    made.add_argument("--root", type=Path, help="an ImageFolder tree; default: photographs made for the purpose")
    made.add_argument("--images", type=int, default=480, help="made, and measured in each round")
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--image-size", type=int, default=224, help="pixels a side of the crops")
    made.add_argument("--threads", type=int, default=2, help="cores of each process, and workers of each loader")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="of the batches; cuda: DALI decodes there"
    )
    made.add_argument("--out", type=Path, help="path of the results, without a suffix")
    made.add_argument("--one", help=argparse.SUPPRESS)
    made.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return made.parse_args(arguments)


def make_photos(folder: Path, count: int) -> None:
    """JPEG files in class folders: cuts at random places of some photographs."""
    generator = np.random.default_rng(0)
    photos = [Image.open(photo_path(name)).convert("RGB") for name in PHOTOS]
    for number in range(count):
        photo = photos[number % len(photos)]
        height = generator.uniform(0.6, 1) * min(photo.height, photo.width * SIZE[1] / SIZE[0])
        width = height * SIZE[0] / SIZE[1]
        x, y = generator.uniform(0, photo.width - width), generator.uniform(0, photo.height - height)
        path = folder / f"class{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.resize(SIZE, Image.Resampling.BICUBIC, box=(x, y, x + width, y + height)).save(path, quality=QUALITY)


def batches(name: str, options: argparse.Namespace) -> Iterator:
    """The endless stream of batches of one contender."""
    if name == PEER:
        return torchvision_batches(options)
    if name in (READING, PYTHON):
        loader = our_loader("dali", "files", options)
        if name == PYTHON:
            source = loader.plan.source
            source.read = [source.read(number) for number in range(len(source))].__getitem__
        return (encoded.inputs(flip=False) for encoded in loader.encoded(0))
    return our_loader(*OURS[name], options).stream(0)


def our_loader(kind: str, folder: str, options: argparse.Namespace):
    side = options.image_size
    data = DataConfig(loader=kind, image_size=(side, side), workers=options.threads, max_bad=1.0)
    source = open_images(str(options.work / folder), path=index_of(options.work, folder))
    return build_loader(source, data, 0, options.batch, device=options.device)


def index_of(work: Path, folder: str) -> str:
    """Tars have theirs beside them."""
    return str(work / "files.arrow") if folder == "files" else ""


def torchvision_batches(options: argparse.Namespace) -> Iterator:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(options.image_size, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    images = ImageFolder(options.work / "files", v2.Compose([crop, v2.PILToTensor()]))
    loader = DataLoader(
        images, options.batch, shuffle=True, drop_last=True, num_workers=options.threads, persistent_workers=True
    )
    while True:
        for images_BCHW, _ in loader:
            yield images_BCHW.to(options.device)


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Images per second of wall time and CPU milliseconds per image, children included, after a warm-up."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    stream = batches(name, options)
    steps = max(1, options.images // options.batch)
    for _ in itertools.islice(stream, 3):
        pass
    synchronise(torch.device(options.device))
    start, cpu = time.perf_counter(), time.process_time()
    for _ in itertools.islice(stream, steps):
        pass
    synchronise(torch.device(options.device))
    elapsed, used = time.perf_counter() - start, time.process_time() - cpu
    images = steps * options.batch
    return {"images_per_second": images / elapsed, "cpu_ms": 1e3 * used / images}


def in_a_process(name: str, options: argparse.Namespace) -> dict[str, float]:
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    kept = ["batch", "device", "image_size", "images", "threads"]
    command = [sys.executable, __file__, "--one", name, "--work", str(options.work)]
    command += [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in kept]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def over_rounds(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}


def run(options: argparse.Namespace) -> list[dict]:
    names = [PEER, *OURS, READING, PYTHON]
    found: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names:
            found[name].append(in_a_process(name, options))
            print(f"round {number + 1}: {name}: {found[name][-1]['images_per_second']:.0f} img/s", flush=True)
    rows = []
    for name in names:
        rates = [figures["images_per_second"] for figures in found[name]]
        peers = [figures["images_per_second"] for figures in found[PEER]]
        rows.append(
            {
                "name": name,
                "ours": name != PEER,
                "images_per_second": over_rounds(rates),
                "ratio": over_rounds([rate / peer for rate, peer in zip(rates, peers, strict=True)]),
                "cpu_ms": over_rounds([figures["cpu_ms"] for figures in found[name]]),
            }
        )
    return rows


def summary(rows: list[dict]) -> dict[str, float]:
    """The figures that are aimed at."""
    by_name = {row["name"]: row for row in rows}

    def rounds(name: str, key: str) -> list[float]:
        return by_name[name][key]["rounds"]

    def median_ratio(one: str, other: str, key: str) -> float:
        return statistics.median(a / b for a, b in zip(rounds(one, key), rounds(other, key), strict=True))

    return {
        "dali_over_torchvision": by_name["dali, files"]["ratio"]["median"],
        "tars_over_files_dali": median_ratio("dali, tars", "dali, files", "images_per_second"),
        "tars_over_files_torch": median_ratio("torch, tars", "torch, files", "images_per_second"),
        "python_share_of_cpu": median_ratio(PYTHON, "dali, files", "cpu_ms"),
        "reading_share_of_cpu": median_ratio(READING, "dali, files", "cpu_ms"),
    }


def body(rows: list[dict], found: dict[str, float]) -> str:
    lines = [
        [
            row["name"],
            pages.spread(row["images_per_second"], 0),
            pages.spread(row["ratio"], 2),
            pages.spread(row["cpu_ms"], 3) if row["name"] != PEER else "-",
        ]
        for row in rows
    ]
    table = pages.table(lines, ["loader", "img/s", f"x {PEER}", "CPU ms per image"])
    return (
        f"{table}\n\n"
        f"DALI from files is {found['dali_over_torchvision']:.2f} times {PEER}; from tars "
        f"{found['tars_over_files_dali']:.3f} of from files (Pillow: {found['tars_over_files_torch']:.3f}). Of its CPU "
        f"time our Python (order, crops, threads, feeding) takes {found['python_share_of_cpu']:.1%}, with the files' "
        f"reading {found['reading_share_of_cpu']:.1%}."
    )


def plot(path: Path, result: dict) -> None:
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["name"] not in (READING, PYTHON)]
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    rates = [row["images_per_second"] for row in rows]
    reach = [[r["median"] - r["min"] for r in rates], [r["max"] - r["median"] for r in rates]]
    colours = ["C0" if row["ours"] else "C7" for row in rows]
    axes.barh([row["name"] for row in rows], [r["median"] for r in rates], xerr=reach, color=colours, capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel("images per second, median and spread over the rounds")
    axes.set_title(result["environment"]["device"], fontsize=10)
    figure.savefig(path, dpi=150)


def prepare(options: argparse.Namespace) -> None:
    """The folders `files`, `tars` and `small` below the work place."""
    if options.root is None:
        make_photos(options.work / "files", options.images)
    else:
        (options.work / "files").symlink_to(options.root.resolve())
    source = open_images(str(options.work / "files"), path=index_of(options.work, "files"))
    write_shards(source, str(options.work / "tars"))
    write_shards(source, str(options.work / "small"), side=SMALL)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return 0
    with tempfile.TemporaryDirectory() as work:
        options.work = Path(work)
        prepare(options)
        rows = run(options)
    options.precision = "uint8"
    found = summary(rows)
    result = {"environment": pages.environment("data", arguments, options), "rows": rows, "summary": found}
    images = "an ImageFolder tree" if options.root else f"{SIZE[0]} x {SIZE[1]} photographs, JPEG quality {QUALITY}"
    notes = (
        f"{options.images} images a round ({images}), {options.image_size} px out, batch {options.batch}, "
        f"{options.threads} cores and as many workers; medians of {options.rounds} interleaved rounds, in brackets the "
        f"least and the largest. {PEER}: ImageFolder, RandomResizedCrop (bicubic), DataLoader."
    )
    prefix = pages.prefix_of("data", options, result["environment"])
    pages.write(result, prefix, pages.page("Images", result, notes, body(rows, found)), lambda path: plot(path, result))
    print(f"\n{body(rows, found)}\n\n{prefix}.md, .json, .png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
