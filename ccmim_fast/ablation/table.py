"""An ablation's figures over seeds, as a table and as a picture."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ccmim_fast.ablation.variants import Ablation
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

FEATURES = {key: COLUMNS[key] for key in ("logreg", "knn")}


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


def plot(figures: Sequence[dict[str, Any]], ablation: Ablation, path: Path) -> None:
    """What the features are worth, where objects are hidden, and how the scores come to find them; a PNG."""
    variants = over_seeds(figures)
    figure = Figure(figsize=(17, max(4.5, 0.3 * len(variants))), layout="constrained")
    worth, end, way = figure.subplots(1, 3)
    if ablation.axis is None:
        _beside(worth, variants)
    else:
        _along(worth, variants, ablation.axis)
    for index, (variant, runs) in enumerate(variants.items()):
        (x, dx), (y, dy) = (spread([run[key] for run in runs]) for key in ("leakage", "auroc"))
        style = {"color": COLOURS[index % len(COLOURS)], "marker": "osD^vPX"[index // len(COLOURS) % 7]}
        end.errorbar(x, y, xerr=dx, yerr=dy, capsize=2, linestyle="none", label=variant, **style)
    end.set(xlabel="object leakage (1: as random)", ylabel="AUROC of the run's scores", title="at the end, ± 1 sd")
    end.legend(fontsize=6, ncols=2)
    for index, variant in enumerate(name for name in ablation.lines if name in variants):
        runs = variants[variant]
        epochs = [look["epoch"] for look in runs[0]["looks"]]
        means, deviations = zip(*(spread([run["looks"][i]["auroc"] for run in runs]) for i in range(len(epochs))))
        way.errorbar(epochs, means, yerr=deviations, capsize=2, label=variant, color=COLOURS[index % len(COLOURS)])
    way.set(xlabel="epoch", ylabel="AUROC of the run's scores", title="on the way")
    way.legend(fontsize=7)
    for axes in (worth, end, way):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _beside(axes: Axes, variants: dict[str, list[dict[str, Any]]]) -> None:
    """Accuracies of each variant, one below the other."""
    places = range(len(variants))
    for index, (key, label) in enumerate(FEATURES.items()):
        means, deviations = zip(*(spread([run[key] for run in runs]) for runs in variants.values()))
        axes.errorbar(means, places, xerr=deviations, capsize=2, fmt="o", label=label, color=COLOURS[index])
    axes.set_yticks(places, variants)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy on held-out images", title="what the features are worth, ± 1 sd")
    axes.legend(fontsize=7)


def _along(axes: Axes, variants: dict[str, list[dict[str, Any]]], axis: Callable) -> None:
    """Accuracy of the linear classifier along each curve; a variant that is a point of none is a level."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    levels = [name for name in variants if axis(name) is None]
    for variant, runs in variants.items():
        if variant not in levels:
            curve, place = axis(variant)
            curves.setdefault(curve, []).append((place, *spread([run["logreg"] for run in runs])))
    for index, (curve, points) in enumerate(curves.items()):
        places, means, deviations = zip(*sorted(points))
        axes.errorbar(places, means, yerr=deviations, capsize=2, marker="o", label=curve, color=COLOURS[index])
    for index, name in enumerate(levels, len(curves)):
        mean, deviation = spread([run["logreg"] for run in variants[name]])
        axes.axhline(mean, linestyle="dashed", label=name, color=COLOURS[index])
        axes.axhspan(mean - deviation, mean + deviation, alpha=0.12, color=COLOURS[index])
    axes.set(xlabel="lambda", ylabel="accuracy, logistic regression", title="what the features are worth, ± 1 sd")
    axes.legend(fontsize=7)
