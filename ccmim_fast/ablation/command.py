"""`ccmim ablate`: runs of equal epochs and of equal time, several seeds, one table."""

import argparse
import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ccmim_fast.ablation.runs import Run, run_all
from ccmim_fast.ablation.table import difference, known, markdown, over_seeds, plot
from ccmim_fast.ablation.variants import ABLATIONS, Ablation
from ccmim_fast.config.load import load_config
from ccmim_fast.config.parser import Parser
from ccmim_fast.errors import ConfigError
from ccmim_fast.runs.folder import environment


def ablate(argv: list[str]) -> Path:
    """`ccmim ablate NAME [--seeds 3] [--jobs 1] [--only VARIANT ...] [--runs DIR] [--out PREFIX] [settings]`.

    NAME is one of ABLATIONS: where scores come from, and the bank's settings one by one (`score`); how patches are
    divided (`strategy`, Table 5); how much the contrast counts (`lambda`, Figure 2); how deep the decoder is
    (`decoder`). Each variant is trained for equal epochs with each seed; where scores are compared, those slower than
    the bank then also for as long as it takes. Settings are those of pretraining, for all variants alike; without
    --config those of the demo, whose objects and labels are known. Of other images, labels in data.root and in --test
    give the accuracies. Runs that were finished before in DIR are not repeated. Writes PREFIX.md, .json and .png;
    returns the first.
    """
    if not argv or argv[0] not in ABLATIONS:
        asked = f"{argv[0]!r:.80}: no such ablation" if argv else "which ablation"
        raise ConfigError(f"ccmim ablate: {asked}; one of {', '.join(ABLATIONS)}")
    name, ablation, program = argv[0], ABLATIONS[argv[0]], f"ccmim ablate {argv[0]}"
    options, settings = _parser(name).parse_known_args(argv[1:])
    for word, way in (("--seed", "--seeds N"), ("--run.dir", "--runs DIR")):
        if any(setting.partition("=")[0] == word for setting in settings):
            raise ConfigError(f"{word}: each run has its own; use {way}")
    settings = on_a_base(settings)
    base = load_config(settings, program)
    if options.test and base.data.source != "images":
        raise ConfigError(f"--test={options.test}: data.source={base.data.source} makes its own; nearest is images")
    if options.test and not Path(options.test).is_dir():
        raise ConfigError(f"--test={options.test}: no such folder; nearest is {Path(options.test).parent}")
    variants = ablation.variants(base)
    unknown = [variant for variant in options.only or () if variant not in variants]
    if unknown:
        raise ConfigError(f"--only={unknown[0]!r:.80}: no such variant; one of: {'; '.join(variants)}")
    names = options.only or list(variants)
    runs = [Run(variant, seed, (*settings, *variants[variant])) for seed in range(options.seeds) for variant in names]
    figures = run_all(runs, options.runs, options.jobs, options.test)
    slower = equal_time(figures, base.train.epochs, ablation.time_of)
    more = [
        Run(
            f"{variant}, in {ablation.time_of}'s time",
            seed,
            (*settings, *variants[variant], f"--train.epochs={epochs}"),
        )
        for seed in range(options.seeds)
        for variant, epochs in slower.items()
    ]
    figures += run_all(more, options.runs, options.jobs, options.test)
    return write(ablation, figures, options.out, shlex.join(["ccmim", "ablate", *argv]))


def on_a_base(settings: list[str]) -> list[str]:
    """The settings, on top of the demo's where they name no file or preset."""
    return settings if any(word.startswith("--config") for word in settings) else ["--config", "demo", *settings]


def equal_time(figures: Sequence[dict[str, Any]], epochs: int, time_of: str) -> dict[str, int]:
    """Of the variants that each are 5 % slower than `time_of` or more: the epochs that fit into its time."""
    rates = {
        name: statistics.median(run["images_per_second"] for run in runs) for name, runs in over_seeds(figures).items()
    }
    if time_of not in rates:
        return {}
    fitting = {name: round(epochs * rate / rates[time_of]) for name, rate in rates.items() if "," not in name}
    return {name: count for name, count in fitting.items() if 0 < count <= 0.95 * epochs}


def write(ablation: Ablation, figures: Sequence[dict[str, Any]], prefix: Path, command: str) -> Path:
    """The figures of all runs, their table and picture; returns the table's path."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    where = environment(torch.device("cpu")) | {"command": command}
    prefix.with_name(prefix.name + ".json").write_text(json.dumps({"environment": where, "runs": figures}, indent=1))
    plot(figures, ablation, prefix.with_name(prefix.name + ".png"))
    text = [f"# {ablation.title}\n\n    {command}\n", markdown(figures)]
    for one, other in ablation.compared:
        if {one, other} <= over_seeds(figures).keys():
            for key in known(figures, ("auroc", "leakage", "knn", "logreg")):
                mean, deviation = difference(figures, one, other, key)
                text.append(f"- {one} - {other}, {key}: {mean:+.3f} ± {deviation:.3f} (same seed)")
    seeds = len({run["seed"] for run in figures})
    text.append(f"\nMean ± standard deviation over {seeds} seeds. {_words(where)}\n\n![scores]({prefix.name}.png)\n")
    path = prefix.with_name(prefix.name + ".md")
    path.write_text("\n".join(text))
    return path


def _words(where: dict[str, str]) -> str:
    return f"{where['device']}, torch {where['torch']}, commit {where['commit']}."


def _parser(name: str) -> argparse.ArgumentParser:
    parser = Parser(f"ccmim ablate {name}", description=ablate.__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=_count, default=3, help="runs of each variant")
    parser.add_argument("--jobs", type=_count, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants alone")
    parser.add_argument("--test", default="", metavar="DIR", help="labelled images that features are tested on")
    parser.add_argument("--runs", type=Path, default=Path(f"runs/ablate-{name}"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path(f"runs/ablate-{name}/table"), help="path without its ending")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.20} must be a whole number from 1 on")
    return int(text)
