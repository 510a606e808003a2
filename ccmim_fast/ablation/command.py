"""`ccmim ablate score`: runs of equal epochs and of equal time, several seeds, one table."""

import argparse
import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from ccmim_fast.ablation.runs import Run, run_all
from ccmim_fast.ablation.table import difference, markdown, over_seeds, plot
from ccmim_fast.ablation.variants import score_variants
from ccmim_fast.config.load import load_config
from ccmim_fast.errors import ConfigError
from ccmim_fast.trainer.run_folder import environment

TIME_OF = "bank"  # the variant whose time the slower ones are given once more
LINES = ("random", "first", "all", "bank")


def ablate_score(argv: list[str]) -> Path:
    """`ccmim ablate score [--seeds 3] [--jobs 1] [--only NAME ...] [--runs DIR] [--out PREFIX] [settings]`.

    Where scores come from, and the bank's settings one by one, on images whose objects are known. Each variant is
    trained for equal epochs with each seed; those slower than the bank then also for as long as it takes. Settings are
    those of pretraining, for all variants alike; without --config those of the demo. Runs that were finished before in
    DIR are not repeated. Writes PREFIX.md, .json and .png; returns the first.
    """
    options, settings = _parser().parse_known_args(argv)
    settings = settings if any(a.startswith("--config") for a in settings) else ["--config", "demo", *settings]
    base = load_config(settings, "ccmim ablate score")
    if base.data.source != "shapes":
        raise ConfigError(f"data.source={base.data.source}: the ablation needs known objects; nearest: shapes")
    variants = score_variants(base)
    unknown = [name for name in options.only or () if name not in variants]
    if unknown:
        raise ConfigError(f"--only={unknown[0]!r:.80}: no such variant; one of: {'; '.join(variants)}")
    names = options.only or list(variants)
    runs = [Run(name, seed, (*settings, *variants[name])) for seed in range(options.seeds) for name in names]
    figures = run_all(runs, options.runs, options.jobs)
    slower = equal_time(figures, base.train.epochs)
    more = [
        Run(f"{name}, in {TIME_OF}'s time", seed, (*settings, *variants[name], f"--train.epochs={epochs}"))
        for seed in range(options.seeds)
        for name, epochs in slower.items()
    ]
    figures += run_all(more, options.runs, options.jobs)
    return write(figures, options.out, shlex.join(["ccmim", "ablate", "score", *argv]))


def equal_time(figures: Sequence[dict[str, Any]], epochs: int) -> dict[str, int]:
    """Of the variants that each are 5 % slower than the bank or more: the epochs that fit into its time."""
    rates = {
        name: statistics.median(run["images_per_second"] for run in runs) for name, runs in over_seeds(figures).items()
    }
    if TIME_OF not in rates:
        return {}
    fitting = {name: round(epochs * rate / rates[TIME_OF]) for name, rate in rates.items() if "," not in name}
    return {name: count for name, count in fitting.items() if 0 < count <= 0.95 * epochs}


def write(figures: Sequence[dict[str, Any]], prefix: Path, command: str) -> Path:
    """The figures of all runs, their table and picture; returns the table's path."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    where = environment(torch.device("cpu")) | {"command": command}
    prefix.with_name(prefix.name + ".json").write_text(json.dumps({"environment": where, "runs": figures}, indent=1))
    plot(figures, LINES, prefix.with_name(prefix.name + ".png"))
    text = [f"# Where scores come from\n\n    {command}\n", markdown(figures)]
    names = over_seeds(figures).keys()
    if {"all", TIME_OF} <= names:
        for key in ("auroc", "leakage", "knn", "logreg"):
            mean, deviation = difference(figures, TIME_OF, "all", key)
            text.append(f"- {TIME_OF} - all, {key}: {mean:+.3f} ± {deviation:.3f} (same seed)")
    seeds = len({run["seed"] for run in figures})
    text.append(f"\nMean ± standard deviation over {seeds} seeds. {_words(where)}\n\n![scores]({prefix.name}.png)\n")
    path = prefix.with_name(prefix.name + ".md")
    path.write_text("\n".join(text))
    return path


def _words(where: dict[str, str]) -> str:
    return f"{where['device']}, torch {where['torch']}, commit {where['commit']}."


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, as everywhere in `ccmim`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("ccmim ablate score", description=ablate_score.__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=_count, default=3, help="runs of each variant")
    parser.add_argument("--jobs", type=_count, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants alone")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablate-score"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate-score/table"), help="path without its ending")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.20} must be a whole number from 1 on")
    return int(text)
