"""The report is one HTML file that needs no network, no script and no other file."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ccmim_fast.config.load import to_yaml
from ccmim_fast.config.schema import Config

from .curves import curve_svg, line_style
from .pictures import Snapshot, columns_of, picture_uri, snapshot_grid
from .runs import (
    Comparison,
    Remarks,
    RunView,
    against,
    compare,
    differences,
    flatten,
    merge_equal,
    read_evaluations,
    shareable,
)

METHODS = {"untrained": "Untrained", "mae": "MAE", "ccmim": "ccMIM"}  # any other name is shown as it is
CURVES = {
    "recons": "Reconstruction loss",
    "contrast": "Contrastive loss",
    "loss": "Total loss",
    "images_per_second": "Images per second",
    "data_wait": "Share of the time waiting for images",
    "mfu": "Share of the device's matmul rate",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "entropy": "Entropy of the scores, share of log L",
    "h_std": "Spread of the [CLS] projections",
    "h_rank": "Effective rank of the [CLS] projections",
}
FEATURES = {
    "rankme": "RankMe, average",
    "rankme_cls": "RankMe, [CLS]",
    "alpha_req": "alpha-ReQ, average",
    "alpha_req_cls": "alpha-ReQ, [CLS]",
    "uniformity": "Uniformity, average",
    "uniformity_cls": "Uniformity, [CLS]",
    "lidar": "LiDAR, average",
    "lidar_cls": "LiDAR, [CLS]",
    "alignment": "Alignment of both sets' projections",
}  # of the records of kind `features`: docs/long-runs.md
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Column(NamedTuple):
    """A column shows one measure in the summary table."""

    key: str
    heading: str
    higher_is_better: bool
    show: Callable[[float], str]
    meaning: str


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


PERCENT, TWO_DIGITS, THREE_DIGITS = "{:.1%}".format, "{:.2f}".format, "{:.3f}".format
COLUMNS = (
    Column("knn", "kNN", True, PERCENT, "Share of test images named right by their nearest training images."),
    Column("logreg", "Logistic regression", True, PERCENT, "Share named right by a linear classifier of the features."),
    Column("auroc", "AUROC", True, TWO_DIGITS, "How well patch scores tell object from background; 0.5 is chance."),
    Column("leakage", "Leakage", False, TWO_DIGITS, "Object patches left visible; with random masking, 1."),
    Column("recons", "Reconstruction loss", False, THREE_DIGITS, "Error on masked patches, for equal targets only."),
    Column("images_per_second", "Images / s", True, _rate, "Training throughput on the machine under Environment."),
)
TEMPLATES.globals |= {
    "columns": COLUMNS,
    "percent": PERCENT,
    "columns_of": columns_of,
    "snapshot_grid": snapshot_grid,
    "picture_uri": picture_uri,
}


def write_report(
    path: Path,
    title: str,
    runs: Sequence[RunView],
    summary: dict[str, Any],
    standing: Comparison | None = None,
    snapshots: Sequence[list[Snapshot]] = (),
    more_remarks: Sequence[str] = (),
) -> None:
    """Write a self-contained HTML page that compares runs: numbers, curves, pictures, settings.

    The page makes no request and runs no script (its own policy forbids both); all text is escaped. Parts that a run
    folder lacks are left out, and what is damaged is named. A run's place decides its colour.

    Args:
        summary: {"methods": {name: {measure: number or None}}, "chance": share of 1, "setting": {key: value}}, all
            optional; measures are the keys of COLUMNS and each with `_early`. A missing one is a dash.
        standing: how each run stands, a row a run.
        snapshots: of each run, what to show where it kept none.
    """
    names, remarks = [METHODS.get(run.name, run.name) for run in runs], Remarks()

    def all_of(read: Callable[[RunView], Any], nothing: Any) -> list[Any]:
        return [remarks.read(partial(read, run), nothing) for run in runs]

    configs = compare(names, all_of(RunView.config, {}))
    # All runs differ in their folder.
    configs = configs._replace(rows=[row for row in configs.rows if row[0] != "run.dir"])
    methods = {METHODS.get(name, name): measures for name, measures in (summary.get("methods") or {}).items()}
    shown = [own or more for own, more in zip_longest(all_of(RunView.snapshots, []), snapshots, fillvalue=[])]
    evaluated = [read_evaluations(run, remarks) for run in runs]
    figures = [{f"{one.name}: {key}": value for one in of for key, value in one.figures.items()} for of in evaluated]
    lines = [(name, run.metrics()) for name, run in zip(names, runs)]
    looks = [(name, run.metrics("features")) for name, run in zip(names, runs)]
    page = TEMPLATES.get_template("page.html").render(
        title=title,
        abstract=_abstract(methods, summary.get("chance")),
        setting=flatten(summary.get("setting") or {}),
        methods=methods,
        best={column.key: _best(column, methods.values()) for column in COLUMNS},
        chance=summary.get("chance"),
        standing=standing
        and standing._replace(rows=[(name, list(map(shareable, row[1]))) for name, row in zip(names, standing.rows)]),
        legend=[(name, *line_style(i)) for i, name in enumerate(names)],
        curves=_curves(lines, CURVES),
        feature_curves=_curves(looks, FEATURES),
        features=compare(names, [_last_look(rows) for _, rows in looks]),
        galleries=[(name, of_run) for name, of_run in zip(names, shown) if of_run],
        figures=compare(names, figures),
        evaluations=list(zip(names, evaluated)),
        differences=differences(configs),
        defaults=against(flatten(yaml.safe_load(to_yaml(Config()))), "default", configs),
        environment=merge_equal(compare(names, all_of(RunView.environment, {}))),
        remarks=[*remarks, *map(shareable, more_remarks)],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names of files may be bytes that are no text.
    path.write_text(page, encoding="utf-8", errors="replace")


def _curves(lines: Sequence[tuple[str, list[dict]]], labels: dict[str, str]) -> list[tuple[str, Markup]]:
    """Return label and drawing of each quantity that some run has."""
    drawn = [(label, curve_svg(lines, key, label, uid=f"curve-{key}")) for key, label in labels.items()]
    # Markup: matplotlib escapes its text, and `curve_svg` the names.
    return [(label, Markup(svg)) for label, svg in drawn if svg is not None]


def _last_look(rows: list[dict]) -> dict[str, str]:
    """Return the figures of a run's last look at its features, as text by their labels; {} without one."""
    last = {"epoch": "epoch", "images": "images", **FEATURES}
    known = {label: rows[-1].get(key) for key, label in last.items()} if rows else {}
    return {label: f"{value:.4g}" for label, value in known.items() if isinstance(value, int | float)}


def _abstract(methods: dict[str, dict[str, float | None]], chance: float | None) -> list[str]:
    """Write the sentences under the headline, of numbers of the summary alone."""
    sentences = []
    if known := [f"{PERCENT(m['knn'])} ({name})" for name, m in methods.items() if m.get("knn") is not None]:
        guessed = "" if chance is None else f"; chance is {PERCENT(chance)}"
        sentences.append(f"Nearest-neighbour accuracy of frozen features: {', '.join(known)}{guessed}.")
    if seen := [f"{m['leakage']:.2f} ({name})" for name, m in methods.items() if m.get("leakage") is not None]:
        sentences.append(f"Share of object patches left visible, relative to random masking: {', '.join(seen)}.")
    return sentences


def _best(column: Column, methods: Sequence[dict[str, float | None]]) -> str | None:
    """Return the best number as shown, so that equal texts are marked alike; None for fewer than two."""
    values = [m[column.key] for m in methods if m.get(column.key) is not None and math.isfinite(m[column.key])]
    if len(values) < 2:
        return None
    return column.show(max(values) if column.higher_is_better else min(values))
