"""An ablation's figures over seeds, as a table and as a picture."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ccmim_fast.report.curves import COLOURS

COLUMNS = {
    "auroc": "AUROC of the run's scores",
    "leakage": "object leakage",
    "auroc_all": "AUROC of its [CLS] rows",
    "knn": "kNN",
    "logreg": "logistic regression",
    "recons": "L_recons",
    "images_per_second": "img/s",
}


def over_seeds(figures: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each variant, in the order in which variants first come."""
    found: dict[str, list[dict[str, Any]]] = {}
    for one in figures:
        found.setdefault(one["variant"], []).append(one)
    return found


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 of a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(figures: Sequence[dict[str, Any]]) -> str:
    """One row a variant: mean ± standard deviation over its seeds."""
    rows = [f"| | epochs | {' | '.join(COLUMNS.values())} |", f"|---|{'--:|' * (1 + len(COLUMNS))}"]
    for variant, runs in over_seeds(figures).items():
        cells = []
        for key in COLUMNS:
            mean, deviation = spread([run[key] for run in runs])
            cells.append(f"{mean:.0f}" if key == "images_per_second" else f"{mean:.3f} ± {deviation:.3f}")
        rows.append(f"| {variant} | {runs[0]['epochs']} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def difference(figures: Sequence[dict[str, Any]], one: str, other: str, key: str) -> tuple[float, float]:
    """Mean and standard deviation, over seeds, of `one` - `other` with the same seed."""
    by_seed = {
        name: {run["seed"]: run[key] for run in runs}
        for name, runs in over_seeds(figures).items()
        if name in (one, other)
    }
    common = by_seed[one].keys() & by_seed[other].keys()
    return spread([by_seed[one][seed] - by_seed[other][seed] for seed in sorted(common)])


def plot(figures: Sequence[dict[str, Any]], lines: Sequence[str], path: Path) -> None:
    """Where variants hide objects and how well they find them, and how the `lines` among them come there; a PNG."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    end, way = figure.subplots(1, 2)
    variants = over_seeds(figures)
    for index, (variant, runs) in enumerate(variants.items()):
        (x, dx), (y, dy) = (spread([run[key] for run in runs]) for key in ("leakage", "auroc"))
        style = {"color": COLOURS[index % len(COLOURS)], "marker": "osD^vPX"[index // len(COLOURS) % 7]}
        end.errorbar(x, y, xerr=dx, yerr=dy, capsize=2, linestyle="none", label=variant, **style)
    end.set(xlabel="object leakage (1: as random)", ylabel="AUROC of the run's scores", title="at the end, ± 1 sd")
    end.legend(fontsize=6, ncols=2)
    for index, variant in enumerate(name for name in lines if name in variants):
        runs = variants[variant]
        epochs = [look["epoch"] for look in runs[0]["looks"]]
        means, deviations = zip(*(spread([run["looks"][i]["auroc"] for run in runs]) for i in range(len(epochs))))
        way.errorbar(epochs, means, yerr=deviations, capsize=2, label=variant, color=COLOURS[index % len(COLOURS)])
    way.set(xlabel="epoch", ylabel="AUROC of the run's scores", title="on the way")
    way.legend(fontsize=7)
    for axes in (end, way):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
