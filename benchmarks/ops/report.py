"""This module tells the circumstances of a measurement, and makes its tables and its plot."""

import datetime
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

COLUMNS = ("triton", "reference", "compiled", "copy")


def environment(device: torch.device) -> dict[str, str]:
    """Return device, driver, versions, commit and date: names to printable values."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    cuda = device.type == "cuda"
    capability = ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else "none"
    return {
        "command": shlex.join(["ccmim", "bench", "ops", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu (a smoke test: its times say nothing)",
        "capability": capability,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "none",
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "float32 matmul": torch.get_float32_matmul_precision(),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"),
        "date": datetime.date.today().isoformat(),
    }


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.strip() or "unknown").splitlines()[0]


def table(rows: list[list[str]], header: list[str]) -> str:
    """Format Markdown; the first column to the left, the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_table(rows: list[dict]) -> str:
    """Format one line per op, size and pass: times in microseconds with the distance between the quartiles."""
    header = ["op", "B", "width", "pass", "MB", "floor", "copy", "Triton", "share", "eager", "compiled", "peak MB"]
    return table([_measured_row(row) for row in rows], header)


def _measured_row(row: dict) -> list[str]:
    found = row["variants"]
    cells = {name: _time(found.get(name)) for name in COLUMNS}
    share = found.get("triton", {}).get("share_of_floor")
    peaks = [_peak(found.get(name)) for name in COLUMNS[:3]]
    return [
        f"`{row['op']}`",
        str(row["batch"]),
        str(row["width"] or ""),
        row["pass"],
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['floor_us']:.1f}",
        cells["copy"],
        cells["triton"],
        "" if share is None else f"{share:.0%}",
        cells["reference"],
        cells["compiled"],
        " / ".join(peaks),
    ]


def _time(found: dict | None) -> str:
    if found is None:
        return ""
    return found["error"] if "error" in found else f"{found['median_us']:.1f} ± {found['iqr_us']:.1f}"


def _peak(found: dict | None) -> str:
    return "-" if found is None or "error" in found else f"{found['peak_mb']:.0f}"


def markdown(result: dict) -> str:
    """Write the whole page."""
    notes = (
        f"Medians of {result['rounds']} interleaved rounds on the GPU's clock, L2 flushed before each call, the host "
        f"ahead; after ± the distance between the quartiles. Microseconds. `floor`: bytes (read and written once) at "
        f"the bandwidth of a large copy in this run, {result['copy_tb_per_s']:.3f} TB/s, or FLOPs at the rate "
        f"of a large float32 product, {result['matmul_tflop_per_s']:.1f} TFLOP/s, whichever is longer. `copy`: a "
        f"copy of as many bytes. `share`: floor / Triton. `peak MB`: allocated beyond the inputs by Triton / eager / "
        f"compiled. Tests of every op listed: {result['tests']}."
    )
    return "\n\n".join(["# Ops", facts(result["environment"]), notes, measured_table(result["rows"])]) + "\n"


def facts(environment: dict[str, str]) -> str:
    return table([[name, str(value)] for name, value in environment.items()], ["environment", ""])


def plot(result: dict, path: Path) -> None:
    """Draw two roofs: bandwidth reached against bytes moved, and for ops with matrix products FLOP/s against FLOPs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    memory, compute = figure.subplots(1, 2)
    _panel(memory, result, "bytes", result["copy_tb_per_s"], "TB/s", "bytes read and written")
    _panel(compute, result, "flops", result["matmul_tflop_per_s"], "TFLOP/s", "FLOPs")
    figure.suptitle(f"{result['environment']['device']}, {result['environment']['date']}")
    figure.savefig(path, dpi=150)


def _panel(axes, result: dict, quantity: str, roof: float, unit: str, what: str) -> None:
    """Draw one roof: ops are colours, implementations are markers; filled: Triton."""
    rows = [row for row in result["rows"] if (row["flops"] > 0) == (quantity == "flops")]
    colours = {op: f"C{index}" for index, op in enumerate(dict.fromkeys(row["op"] for row in rows))}
    markers = {"triton": ("o", "full"), "reference": ("s", "none"), "compiled": ("^", "none"), "copy": ("_", "full")}
    for row in rows:
        for name, (marker, fill) in markers.items():
            found = row["variants"].get(name)
            if found is None or "error" in found or (name == "copy" and quantity == "flops"):
                continue
            rate = row[quantity] / found["median_us"] * 1e-6
            colour = "black" if name == "copy" else colours[row["op"]]
            axes.plot(row[quantity], rate, marker=marker, fillstyle=fill, color=colour, linestyle="none")
    axes.axhline(roof, color="black", linewidth=1, label=f"roof {roof:.3g} {unit}")
    for op, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=op)
    for name, (marker, fill) in markers.items():
        axes.plot([], [], marker, fillstyle=fill, color="black", label={"reference": "eager"}.get(name, name))
    axes.set(xscale="log", yscale="log", xlabel=what, ylabel=unit)
    axes.legend(fontsize=7, loc="lower right")
