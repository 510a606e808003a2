"""Training curves are inline SVG: matplotlib draws, the page's style sheet gives ink and font."""

import html
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito (2008), told apart under every common colour blindness; their yellow and black drown in a page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
POINTS = 400  # of one curve at most: about one a pixel; more are averaged in groups

# Stand-ins that matplotlib writes and the page's colours replace, so that one drawing fits light and dark.
INK, RULE = "#010203", "#040506"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ccmim",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": RULE,
    "grid.color": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}


def read_metrics(path: Path, kind: str = "train") -> list[dict]:
    """Read the lines of one kind of a metrics.jsonl, of training steps or `features`; their steps rise.

    A line that is not JSON is left out: a killed run leaves half a line, and a resumed one may write on behind it. A
    step that comes again (training went back to a checkpoint) replaces all lines from it on. Returns [] where the file
    is missing.
    """
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(row, dict) or row.get("kind") != kind or not isinstance(row.get("step"), int):
            continue
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return rows


def line_style(index: int) -> tuple[str, str]:
    """Return colour ("#rrggbb") and dash ("solid", "dashed") of the run at `index`, the same in every plot."""
    return COLOURS[index % len(COLOURS)], ("solid", "dashed")[index // len(COLOURS) % 2]


def curve_svg(runs: Sequence[tuple[str, list[dict]]], key: str, label: str, uid: str) -> str | None:
    """Plot one quantity of several runs against the epoch.

    A run without the quantity is left out, and so is one where it is zero throughout: a term that is switched off.
    `runs` are names and lines of which `key` is a field; a run's place decides its colour, see `line_style`.
    `label` says what the plot shows, for readers who cannot see it. `uid`, unique in its page, begins every id in the
    drawing.

    Returns an <svg> element with no outside reference, or None where no run has the quantity.
    """
    series = [(i, name, *_points(rows, key)) for i, (name, rows) in enumerate(runs)]
    series = [(i, name, epochs, values) for i, name, epochs, values in series if values.any()]
    if not series:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 2.4), layout="constrained")
        axes = figure.add_subplot()
        for i, _, epochs, values in series:
            colour, dash = line_style(i)
            # One point is no line: show it as a dot.
            axes.plot(epochs, values, color=colour, linestyle=dash, linewidth=1.6, marker="o" * (len(epochs) == 1))
        axes.set_xlabel("epoch")
        axes.grid(axis="y", linewidth=0.6)
        axes.tick_params(length=0)
        axes.margins(x=0.02)
        buffer, unsaid = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=unsaid)
    return _inline(buffer.getvalue(), f"{label}: {', '.join(name for _, name, _, _ in series)}", uid)


def _points(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return epochs and values, at most POINTS of each; values that are missing or not finite are left out."""
    pairs = [(row.get("epoch"), row.get(key)) for row in rows]
    pairs = [pair for pair in pairs if all(isinstance(value, (int, float)) and math.isfinite(value) for value in pair)]
    pairs = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    groups = np.array_split(pairs, min(len(pairs), POINTS)) if len(pairs) else []
    means = np.array([group.mean(axis=0) for group in groups]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


def _inline(svg: str, label: str, uid: str) -> str:
    """Make matplotlib's SVG file an element of a page: no prolog, no namespaces, ids of its own, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{uid}-", svg)
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
