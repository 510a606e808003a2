"""Where results go, what they say of themselves, and their tables and charts."""

import datetime
import importlib.metadata
import json
import re
import shlex
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from ccmim_fast.runs.folder import environment as run_environment

RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("transformers", "lightly", "stable-pretraining")


def environment(name: str, arguments: list[str], options: Namespace) -> dict[str, str]:
    """Command, device, versions, commit and time: names to printable values."""
    device = torch.device(options.device)
    found = run_environment(device) | {
        "command": shlex.join(["ccmim", "bench", name, *arguments]),
        "time": datetime.datetime.now().isoformat(timespec="seconds"),
    }
    if device.type == "cpu":
        found["device"] += f", {_processor()}"
        found["threads"] = str(options.threads)
    for package in PEERS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    """The model of the CPU, as Linux names it."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found.group(1) if found else "unknown processor"


def prefix_of(name: str, options: Namespace, environment: dict[str, str]) -> Path:
    """Where the results go: `--out`, or a name of date, device and precision; never over another measurement."""
    if options.out is not None:
        return options.out
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    base = RESULTS / f"{name}-{environment['time'][:10]}-{device}-{options.precision}"
    prefix, count = base, 1
    while prefix.with_name(prefix.name + ".json").exists():
        count += 1
        prefix = base.with_name(f"{base.name}-{count}")
    return prefix


def write(result: dict, prefix: Path, markdown: str, plot: Callable[[Path], None]) -> None:
    """The same result as .json, .md and .png."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(prefix.name + ".json").write_text(json.dumps(result, indent=1) + "\n")
    prefix.with_name(prefix.name + ".md").write_text(markdown)
    plot(prefix.with_name(prefix.name + ".png"))


def table(rows: list[list[str]], header: list[str]) -> str:
    """Markdown; the first column to the left, the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(title: str, result: dict, notes: str, body: str) -> str:
    """The whole page in Markdown."""
    facts = table([[name, str(value)] for name, value in result["environment"].items()], ["environment", ""])
    return "\n\n".join([f"# {title}", facts, notes, body]) + "\n"


def size_of(result: dict) -> str:
    """What all contenders did: architecture, image size, batch, precision."""
    return f"{result['arch']}, {result['image_size']} px, batch {result['batch']}, {result['precision']}"


def spread(found: dict, digits: int) -> str:
    """`2.31 (2.28..2.33)`: median, least and largest over the rounds."""
    median, low, high = (f"{found[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({low}..{high})"


def bars(path: Path, result: dict, rows: list[dict]) -> None:
    """Images per second with their spread, and peak memory beside them; one bar a row, the first on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.4 * len(rows)), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True)
    names = [row["name"] for row in rows]
    colours = ["C0" if row["ours"] else "C7" for row in rows]
    rates = [row["images_per_second"] for row in rows]
    medians = [rate["median"] for rate in rates]
    reach = [[r["median"] - r["min"] for r in rates], [r["max"] - r["median"] for r in rates]]
    speed.barh(names, medians, xerr=reach, color=colours, capsize=3)
    memory.barh(names, [row["peak_bytes"] / 1e9 for row in rows], color=colours)
    speed.set_xlabel("images per second, median and spread over the rounds")
    memory.set_xlabel("peak memory, GB")
    speed.invert_yaxis()
    figure.suptitle(f"{size_of(result)}; {result['environment']['device']}", fontsize=10)
    figure.savefig(path, dpi=150)
