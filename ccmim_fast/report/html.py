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
from .evaluations import Evaluation, read_evaluations
from .pictures import Snapshot, columns_of, picture_uri, snapshot_grid
from .runs import Comparison, Remarks, RunView, against, compare, differences, flatten, merge_equal
from .snapshots import Snapshots

MISSING = "—"
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
NONE = Snapshots([], [])
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


class Cell(NamedTuple):
    """A cell shows one number of the summary table; `early` is the same measure early in training, or ""."""

    text: str
    early: str
    best: bool


class Picture(NamedTuple):
    """A picture is the grid of images at one epoch; the page opens it at first where `shown`."""

    epoch: float
    columns: tuple[str, ...]
    rows: int
    uri: str
    shown: bool


def write_report(
    path: Path,
    title: str,
    runs: Sequence[RunView],
    summary: dict[str, Any],
    standing: Comparison | None = None,
    snapshots: Sequence[Snapshots] = (),
) -> None:
    """Write a self-contained HTML page that compares runs: numbers, curves, pictures, settings.

    The page makes no request and runs no script (its own policy forbids both); all text is escaped. Parts that a run
    folder lacks are left out, and what is damaged is named.

    Args:
        path: file to write; its folder is made.
        title: plain text.
        runs: in the order shown; its place decides a run's colour.
        summary: {"methods": {name: {measure: number or None}}, "chance": share of 1, "setting": {key: value}}, all
            optional; measures are the keys of COLUMNS and each with `_early`. A missing one is a dash.
        standing: how each run stands, a row a run.
        snapshots: of each run, what to show where it kept none.
    """
    names, remarks = [_name_of(run.name) for run in runs], Remarks()

    def all_of(read: Callable[[RunView], Any], nothing: Any) -> list[Any]:
        return [remarks.read(partial(read, run), nothing) for run in runs]

    configs = compare(names, all_of(_options, {}))
    shown = [own or more.taken for own, more in zip_longest(all_of(RunView.snapshots, []), snapshots, fillvalue=NONE)]
    evaluated = [read_evaluations(run, remarks) for run in runs]
    page = TEMPLATES.get_template("page.html").render(
        title=title,
        abstract=_abstract(summary),
        setting=flatten(summary.get("setting") or {}),
        columns=COLUMNS,
        table=_table(summary.get("methods") or {}),
        chance=summary.get("chance"),
        percent=PERCENT,
        standing=standing and standing._replace(rows=[(_name_of(name), cells) for name, cells in standing.rows]),
        legend=[(name, *line_style(i)) for i, name in enumerate(names)],
        curves=_curves([(name, run.metrics()) for name, run in zip(names, runs)]),
        galleries=[(name, _gallery(of_run)) for name, of_run in zip(names, shown) if of_run],
        evaluations=compare(names, [_figures(of_run) for of_run in evaluated]),
        protocols=_of_each(names, evaluated),
        picture_uri=picture_uri,
        differences=differences(configs),
        defaults=against(_without_folder(flatten(yaml.safe_load(to_yaml(Config())))), "default", configs),
        environment=merge_equal(compare(names, all_of(RunView.environment, {}))),
        remarks=[*remarks, *(line for more in snapshots for line in more.remarks)],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names of files may be bytes that are no text.
    path.write_text(page, encoding="utf-8", errors="replace")


def _name_of(method: str) -> str:
    return METHODS.get(method, method)


def _options(run: RunView) -> dict[str, str]:
    """Read the settings without the run's own folder, in which all runs differ."""
    return _without_folder(run.config())


def _without_folder(options: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in options.items() if key != "run.dir"}


def _figures(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """Name the figures of one run by their evaluation."""
    return {f"{one.name}: {key}": value for one in evaluations for key, value in one.figures.items()}


def _of_each(names: Sequence[str], evaluated: Sequence[Sequence[Evaluation]]) -> list[tuple[str, Evaluation]]:
    """Return (run and evaluation, the evaluation) for each that has more to tell than figures."""
    return [
        (f"{name}, {one.name}", one)
        for name, of_run in zip(names, evaluated)
        for one in of_run
        if one.protocol or one.deviations or one.pictures
    ]


def _abstract(summary: dict[str, Any]) -> list[str]:
    """Write the sentences under the headline, of numbers of the summary alone."""
    methods = [(_name_of(name), measures) for name, measures in (summary.get("methods") or {}).items()]
    sentences = []
    known = [f"{PERCENT(m['knn'])} ({name})" for name, m in methods if m.get("knn") is not None]
    if known:
        chance = "" if summary.get("chance") is None else f"; chance is {PERCENT(summary['chance'])}"
        sentences.append(f"Nearest-neighbour accuracy of frozen features: {', '.join(known)}{chance}.")
    seen = [f"{m['leakage']:.2f} ({name})" for name, m in methods if m.get("leakage") is not None]
    if seen:
        sentences.append(f"Share of object patches left visible, relative to random masking: {', '.join(seen)}.")
    return sentences


def _table(methods: dict[str, dict[str, float | None]]) -> list[tuple[str, list[Cell]]]:
    """Make a row a method and a cell a column; the best number of a column is marked where there are several."""
    best = {column.key: _best(column, methods.values()) for column in COLUMNS}

    def cell(column: Column, measures: dict[str, float | None]) -> Cell:
        value, early = measures.get(column.key), measures.get(f"{column.key}_early")
        text = MISSING if value is None else column.show(value)
        return Cell(text, "" if early is None else column.show(early), text == best[column.key])

    return [(_name_of(name), [cell(column, measures) for column in COLUMNS]) for name, measures in methods.items()]


def _best(column: Column, methods: Sequence[dict[str, float | None]]) -> str | None:
    """Return the best number as shown, so that equal texts are marked alike; None for fewer than two."""
    values = [m[column.key] for m in methods if m.get(column.key) is not None and math.isfinite(m[column.key])]
    if len(values) < 2:
        return None
    return column.show(max(values) if column.higher_is_better else min(values))


def _curves(runs: Sequence[tuple[str, list[dict]]]) -> list[tuple[str, Markup]]:
    """Draw (heading, inline SVG) of each plot that has a curve."""
    drawn = [(label, curve_svg(runs, key, label, uid=f"curve-{key}")) for key, label in CURVES.items()]
    # Markup: matplotlib escapes its text, and `curve_svg` the names.
    return [(label, Markup(svg)) for label, svg in drawn if svg is not None]


def _gallery(snapshots: Sequence[Snapshot]) -> list[Picture]:
    """Draw the grids of one run; the first and the last epoch are shown at once, side by side."""
    last = len(snapshots) - 1
    return [
        Picture(
            snapshot.epoch,
            columns_of(snapshot),
            len(snapshot.images_BHWC),
            picture_uri(snapshot_grid(snapshot)),
            shown=i in (0, last),
        )
        for i, snapshot in enumerate(snapshots)
    ]
