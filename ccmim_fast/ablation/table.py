"""An ablation's figures over seeds, as a table and as a picture."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ccmim_fast.ablation.variants import Ablation
from ccmim_fast.evaluation.frozen.views import VIEWS
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

Variants = dict[str, list[dict[str, Any]]]  # the runs of each, over seeds
FEATURES = {key: COLUMNS[key] for key in ("logreg", "knn")}
WORTH = "what the features are worth, ± 1 sd"


def over_seeds(figures: Sequence[dict[str, Any]]) -> Variants:
    """Return the runs of each variant, in the order in which variants first come."""
    names = dict.fromkeys(run["variant"] for run in figures)
    return {name: [run for run in figures if run["variant"] == name] for name in names}


def known(figures: Sequence[dict[str, Any]], keys: Iterable[str]) -> list[str]:
    """Return those of the keys that every run has a figure of."""
    return [key for key in keys if all(run.get(key) is not None for run in figures)]


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (0 of a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(figures: Sequence[dict[str, Any]]) -> str:
    """Make a table, a row a variant: mean ± standard deviation over its seeds."""
    columns = known(figures, COLUMNS)
    rows = {variant: [str(runs[0]["epochs"]), *_cells(runs, columns)] for variant, runs in over_seeds(figures).items()}
    return _table("", ["epochs", *map(COLUMNS.get, columns)], rows)


def views_markdown(figures: Sequence[dict[str, Any]]) -> str:
    """Make a table of all views of the features, see `VIEWS`, for each of `FEATURES`; empty where no run has others."""
    tables = []
    for key, label in FEATURES.items():
        columns = known(figures, (f"{key}{view}" for view in VIEWS))
        if len(columns) > 1:
            names = [VIEWS[column.removeprefix(key)] for column in columns]
            rows = {variant: _cells(runs, columns) for variant, runs in over_seeds(figures).items()}
            tables.append(_table(label, names, rows))
    return "\n".join(tables)


def _table(corner: str, columns: Sequence[str], rows: dict[str, list[str]]) -> str:
    lines = [f"|{f' {corner}' if corner else ''} | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())]) + "\n"


def _cells(runs: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[str]:
    cells = []
    for key in columns:
        mean, deviation = mean_and_sd([run[key] for run in runs])
        cells.append(f"{mean:.0f}" if key == "images_per_second" else f"{mean:.3f} ± {deviation:.3f}")
    return cells


def difference(figures: Sequence[dict[str, Any]], one: str, other: str, key: str) -> tuple[float, float]:
    """Return mean and standard deviation, over seeds, of `one` - `other` with the same seed."""
    values = {(run["variant"], run["seed"]): run[key] for run in figures}
    seeds = [seed for variant, seed in values if variant == one and (other, seed) in values]
    return mean_and_sd([values[one, seed] - values[other, seed] for seed in seeds])


def plot(figures: Sequence[dict[str, Any]], ablation: Ablation, path: Path) -> None:
    """Draw a PNG: what the features are worth, where objects are hidden, and how the scores come to find them."""
    variants = over_seeds(figures)
    panels = [_beside if ablation.axis is None else _along] if known(figures, FEATURES) else []
    panels += [_end, _way] if known(figures, ("auroc", "leakage")) else []
    figure = Figure(figsize=(5.7 * max(len(panels), 1), max(4.5, 0.3 * len(variants))), layout="constrained")
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        panel(axes, variants, ablation)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _end(axes: Axes, variants: Variants, ablation: Ablation) -> None:
    for index, (variant, runs) in enumerate(variants.items()):
        (x, dx), (y, dy) = (mean_and_sd([run[key] for run in runs]) for key in ("leakage", "auroc"))
        axes.errorbar(x, y, xerr=dx, yerr=dy, capsize=2, linestyle="none", label=variant, **_style(index))
    axes.set(xlabel="object leakage (1: as random)", ylabel="AUROC of the run's scores", title="at the end, ± 1 sd")
    axes.legend(fontsize=6, ncols=2)


def _way(axes: Axes, variants: Variants, ablation: Ablation) -> None:
    for index, (variant, runs) in enumerate(variants.items()):
        if variant not in ablation.lines:
            continue
        epochs = [look["epoch"] for look in runs[0]["looks"]]
        means, deviations = zip(*(mean_and_sd([run["looks"][i]["auroc"] for run in runs]) for i in range(len(epochs))))
        axes.errorbar(epochs, means, yerr=deviations, capsize=2, label=variant, **_style(index))
    axes.set(xlabel="epoch", ylabel="AUROC of the run's scores", title="on the way")
    axes.legend(fontsize=7)


def _style(index: int) -> dict[str, str]:
    """Return colour and marker of a variant, the same in each panel."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": "osD^vPX"[index // len(COLOURS) % 7]}


def _beside(axes: Axes, variants: Variants, ablation: Ablation) -> None:
    """Draw the accuracies of each variant, one below the other."""
    places = range(len(variants))
    for index, (key, label) in enumerate(FEATURES.items()):
        means, deviations = zip(*(mean_and_sd([run[key] for run in runs]) for runs in variants.values()))
        axes.errorbar(means, places, xerr=deviations, capsize=2, fmt="o", label=label, color=COLOURS[index])
    axes.set_yticks(places, variants)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy on held-out images", title=WORTH)
    axes.legend(fontsize=7)


def _along(axes: Axes, variants: Variants, ablation: Ablation) -> None:
    """Draw the accuracy of the linear classifier along each curve; a variant that is a point of none is a level."""
    worth = {variant: mean_and_sd([run["logreg"] for run in runs]) for variant, runs in variants.items()}
    curves: dict[str, list[tuple[float, float, float]]] = {}
    levels = []
    for variant, (mean, deviation) in worth.items():
        if point := ablation.axis(variant):
            curves.setdefault(point[0], []).append((point[1], mean, deviation))
        else:
            levels.append(variant)
    for index, (curve, points) in enumerate(curves.items()):
        places, means, deviations = zip(*sorted(points))
        axes.errorbar(places, means, yerr=deviations, capsize=2, marker="o", label=curve, color=COLOURS[index])
    for index, name in enumerate(levels, len(curves)):
        mean, deviation = worth[name]
        axes.axhline(mean, linestyle="dashed", label=name, color=COLOURS[index])
        axes.axhspan(mean - deviation, mean + deviation, alpha=0.12, color=COLOURS[index])
    axes.set(xlabel="lambda", ylabel="accuracy, logistic regression", title=WORTH)
    axes.legend(fontsize=7)
