"""What a score bank costs: a step with it beside one without, each of its parts alone, and stores of many maps.

    ccmim bench bank [--stores] [--section.key=value ...]

Steps of scores from the first block and from the bank take turns in one process, on the same random images; the bank's
steps plan, read and write as in a run, with a map for each image of ImageNet. `--stores` measures memory and file
instead, up to 100 million maps: 13 GB of disk, minutes. Writes benchmarks/results/bank-<date>-<device>-<precision>.md
and .json.
"""

import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import command_line
import contenders
import numpy as np
import pages
import torch
from measure import random_images

sys.path.insert(0, str(Path(__file__).parent / "ops"))
from timing import Variant, time_variants

from ccmim_fast.bank.bank import read_maps, update_maps
from ccmim_fast.bank.stores import FileStore, open_store
from ccmim_fast.config.keys import settings
from ccmim_fast.models.precision import choose_precision
from ccmim_kernels import cls_row

IMAGENET = 1_281_167
ROWS = 1024  # of a step
# Maps, cells a side; the last would take 51 GB with 16 x 16 cells.
SIZES = [("host", IMAGENET, 16), ("host", 10_000_000, 16), ("file", IMAGENET, 16), ("file", 100_000_000, 8)]
TIMES = 20  # of each, medians


def steps(options: Namespace) -> dict[str, Variant]:
    """A whole training step of each kind."""
    device = torch.device(options.device)
    found = {}
    for name in ("ccmim-first", "ccmim-bank"):
        images_BHWC = random_images(options.batch, options.image_size, device)
        given = [*contenders.CONTENDERS[name].settings, *options.settings]
        step = contenders.ours(given, options.arch, images_BHWC, options.precision)
        found[name] = Variant(lambda _, step=step: step())
    return found


def parts(options: Namespace) -> dict[str, Variant]:
    """What the bank adds, alone, at the shapes of ViT-B/16; without the planning of `lend`."""
    device, batch = torch.device(options.device), options.batch
    dtype = choose_precision(options.precision, device).dtype or torch.float32
    grid, keep, heads, width, blocks, cells = (14, 14), 49, 12, 64, 12, settings()["score.grid"].default
    passes = [
        [torch.randn(batch, tokens, 3, heads, width, device=device, dtype=dtype) for _ in range(blocks)]
        for tokens in (keep + 1, 196 - keep + 1)
    ]
    maps = torch.randn(batch, cells, cells, device=device).half()
    boxes = torch.tensor([0.1, 0.2, 0.7, 0.6], dtype=torch.float64, device=device).expand(batch, 4)
    scores = torch.randn(batch, 196, device=device)

    def rows(_: object) -> None:
        for blocks_of_pass in passes:
            total = None
            for qkv in blocks_of_pass:
                q, k, _ = qkv.unbind(2)
                total = cls_row(q[:, 0], k, prefix=1, kind="softmax", scale=width**-0.5, total_BL=total)

    store = open_store("device", IMAGENET, cells, device, Path())
    numbers = np.random.default_rng(0).choice(IMAGENET, batch, replace=False)
    return {
        "rows of [CLS], 2 x 12 blocks": Variant(rows),
        "read maps at patches": Variant(lambda _: read_maps(maps, boxes, grid)),
        "write patches to maps": Variant(lambda _: update_maps(maps, boxes, scores, grid, 0.5)),
        "read from the store": Variant(lambda _: store.read(numbers)),
        "write to the store": Variant(lambda _: store.write(numbers, maps)),
    }


def measure_store(name: str, maps: int, cells: int, path: Path) -> dict:
    """Opening, taking and putting of ROWS random maps, milliseconds; of a file also from the disk."""
    start = time.perf_counter()
    store = open_store(name, maps, cells, torch.device("cpu"), path)
    row = {"store": name, "maps": maps, "cells": cells, "gb": maps * cells**2 * 2 / 1e9}
    row["open_s"] = time.perf_counter() - start
    store.contents().fill_(1)  # so that each map has memory of its own, and blocks on the disk
    draw, new = np.random.default_rng(0), torch.ones(ROWS, cells, cells, dtype=torch.float16)

    def some() -> np.ndarray:
        return np.unique(draw.integers(maps, size=ROWS))

    def write() -> None:
        rows = some()
        store.write(rows, new[: len(rows)])

    row["take_ms"] = _median_ms(lambda: store.read(some()))
    row["put_ms"] = _median_ms(write)
    if isinstance(store, FileStore):
        row |= _from_disk(store, path, some)
    return row


def _from_disk(store: FileStore, path: Path, some: Callable[[], np.ndarray]) -> dict[str, float]:
    """Taking what the system has not in memory: unexpected, and expected 0.2 s before."""
    cold, warned, telling = [], [], []
    for _ in range(5):
        for times, ahead in ((cold, False), (warned, True)):
            _forget(path)
            rows = some()
            if ahead:
                start = time.perf_counter()
                store.prefetch(rows)
                telling.append(time.perf_counter() - start)
                time.sleep(0.2)
            start = time.perf_counter()
            store.read(rows)
            times.append(time.perf_counter() - start)
    return {
        "cold_ms": 1e3 * statistics.median(cold),
        "expected_ms": 1e3 * statistics.median(warned),
        "expect_ms": 1e3 * statistics.median(telling),
    }


def _forget(path: Path) -> None:
    """Have the system write a file to the disk, and forget what it has in memory of it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _median_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(TIMES):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def body(result: dict) -> str:
    if "stores" in result:
        header = [
            "store",
            "maps",
            "cells",
            "GB",
            "open s",
            "take ms",
            "put ms",
            "from disk ms",
            "expected ms",
            "expect ms",
        ]
        keys = ("take_ms", "put_ms", "cold_ms", "expected_ms", "expect_ms")
        lines = [
            [
                row["store"],
                f"{row['maps']:,}",
                f"{row['cells']} x {row['cells']}",
                f"{row['gb']:.2f}",
                f"{row['open_s']:.2f}",
                *(f"{row[key]:.2f}" if key in row else "" for key in keys),
            ]
            for row in result["stores"]
        ]
        return pages.table(lines, header)
    first, bank = (result["steps"][name]["median_us"] for name in ("ccmim-first", "ccmim-bank"))
    lines = [
        [name, f"{t['median_us'] / 1e3:.2f}", f"{t['iqr_us'] / 1e3:.2f}", ""] for name, t in result["steps"].items()
    ]
    lines[1][3] = f"{bank / first - 1:+.2%}"
    total = 0.0
    for name, timed in result["parts"].items():
        total += timed["median_us"]
        lines.append(
            [
                name,
                f"{timed['median_us'] / 1e3:.3f}",
                f"{timed['iqr_us'] / 1e3:.3f}",
                f"{timed['median_us'] / first:.3%}",
            ]
        )
    lines.append(["all parts", f"{total / 1e3:.3f}", "", f"{total / first:.2%}"])
    return pages.table(lines, ["", "ms", "quartiles apart", "of a step"])


def notes(result: dict) -> str:
    if "stores" in result:
        return (
            f"{ROWS} random maps at a time, medians of {TIMES} (from disk: 5). `from disk`: after the system has "
            "forgotten the file; `expected`: the same, named 0.2 s before; `expect`: the naming. A virtual disk."
        )
    return (
        f"{pages.size_of(result)}: whole training steps in turn in one process, {result['rounds']} rounds, medians. "
        "Parts alone, on made tensors of these shapes; the rest of the difference between the steps is noise, planning "
        "and caches."
    )


def main(arguments: list[str]) -> int:
    made = command_line.parser("bank", __doc__.split("\n")[0])
    made.set_defaults(rounds=15)
    made.add_argument("--stores", action="store_true", help="measure stores instead of steps")
    options = command_line.parse(made, arguments)
    result = {
        "environment": pages.environment("bank", arguments, options),
        **{name: getattr(options, name) for name in ("arch", "image_size", "batch", "precision", "rounds")},
    }
    if options.stores:
        with tempfile.TemporaryDirectory() as folder:
            result["stores"] = []
            for size in SIZES:
                result["stores"].append(measure_store(*size, Path(folder) / "scores.bin"))
                print(result["stores"][-1], flush=True)
    else:
        torch.set_num_threads(options.threads)
        device = torch.device(options.device)
        for kind, make, rounds in (("steps", steps, options.rounds), ("parts", parts, 5 * options.rounds)):
            timed = time_variants(make(options), max(2, rounds), device)
            result[kind] = {name: found._asdict() for name, found in timed.items()}
    prefix = pages.prefix_of("bank-stores" if options.stores else "bank", options, result["environment"])
    print(f"\n{body(result)}\n")
    pages.write(result, prefix, pages.page("Score bank", result, notes(result), body(result)), lambda path: None)
    print(f"{prefix}.md, .json")
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main, sys.argv[1:]))
