"""An ablation: runs of equal epochs and of equal time, several seeds, one table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ccmim_fast.ablation.runs import Run, flops_per_image, labelled_images, run_all
from ccmim_fast.ablation.table import difference, known, markdown, over_seeds, plot, views_markdown
from ccmim_fast.ablation.variants import ABLATIONS, Ablation, Variants
from ccmim_fast.config.load import load_config
from ccmim_fast.config.schema import Config
from ccmim_fast.errors import ConfigError, say
from ccmim_fast.runs.folder import environment
from ccmim_fast.secrets import without_secrets

_OF_VIEWS = """Accuracies by how tokens become features: the average of the patches' tokens, [CLS], and both beside each
other; of whole images, and of a random set of as many patches as training shows (visible)."""


def run_ablation(
    name: str,
    settings: Sequence[str],
    *,
    seeds: int,
    jobs: int,
    only: Sequence[str],
    test: str,
    runs: Path,
    out: Path,
    command: str,
) -> Path:
    """Train every variant with every seed, and write `out`.md, .json and .png; returns the first.

    `name` is one of `ABLATIONS`, `settings` are options of `ccmim pretrain`, `command` is the line that the table
    shows; the other arguments are those of `ccmim ablate --help`. Raises ConfigError: an unknown variant, a wrong
    setting, or no folder `test`.
    """
    ablation = ABLATIONS[name]
    base = load_config(list(settings), f"ccmim ablate {name}")
    if test and base.data.source != "images":
        raise ConfigError(f"--test={test}: data.source={base.data.source} makes its own; nearest is images")
    if test and not Path(test).is_dir():
        raise ConfigError(f"--test={test}: no such folder; nearest is {Path(test).parent}")
    variants = ablation.variants(base)
    for unknown in set(only) - variants.keys():
        raise ConfigError(f"--only={unknown!r:.80}: no such variant; one of: {'; '.join(variants)}")

    _check_out(out)
    # What is wrong with them is told before the first run.
    for source in labelled_images(base, test) or [] if test else ():
        for why, ids_X in getattr(source, "left_out", {}).items():
            say(f"left out: {len(ids_X)} of {len(source)} images {why}, the first {source.name(int(ids_X[0]))!r}")

    def figures_of(options_of: dict[str, list[str]]) -> list[dict[str, Any]]:
        pairs = [(name, seed) for seed in range(seeds) for name in options_of]
        return run_all([Run(name, seed, (*settings, *options_of[name])) for name, seed in pairs], runs, jobs, test)

    again = {
        f"{variant}, in {ablation.time_of}'s time": [*variants[variant], *_epochs_of(base, epochs)]
        for variant, epochs in _equal_time(variants, only, base, settings, ablation.time_of).items()
    }
    figures = figures_of({variant: variants[variant] for variant in only or variants})
    return write(ablation, figures + figures_of(again), out, command)


def _check_out(prefix: Path) -> None:
    """Raise ConfigError where the table would take the place of files that are no ablation's."""
    there = [path for ending in (".md", ".json", ".png") if (path := _beside(prefix, ending)).exists()]
    try:
        of_ours = json.loads(_beside(prefix, ".json").read_bytes()).keys() >= {"environment", "runs"}
    except (OSError, ValueError, AttributeError, RecursionError):
        of_ours = False
    if there and not of_ours:
        raise ConfigError(f"--out={prefix}: {there[0].name} exists and is no ablation's; name another --out")


def _beside(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)


def _epochs_of(base: Config, epochs: int) -> list[str]:
    """Return the options of a shorter run, whose warm-up is no longer than the run."""
    warm_up = base.optim.warmup_epochs
    return [f"--train.epochs={epochs}", *([f"--optim.warmup_epochs={epochs}"] if warm_up > epochs else [])]


def _equal_time(
    variants: Variants, only: Sequence[str], base: Config, settings: Sequence[str], time_of: str
) -> dict[str, int]:
    """Return `equal_time` of the variants that are trained; nothing where `time_of` is none of them."""
    trained = only or list(variants)
    if time_of not in trained:
        return {}
    flops = {name: flops_per_image([*settings, *variants[name]]) for name in trained}
    return equal_time(flops, base.train.epochs, time_of)


def equal_time(flops: Mapping[str, float], epochs: int, time_of: str) -> dict[str, int]:
    """Return the epochs that fit into the time of `time_of`, for each variant that is slower by 5 % or more.

    Times are as `flops` of an image's training step: counted, they are the same wherever and beside whatever it runs.
    """
    fitting = {name: round(epochs * flops[time_of] / count) for name, count in flops.items()}
    return {name: count for name, count in fitting.items() if 0 < count <= 0.95 * epochs}


def write(ablation: Ablation, figures: Sequence[dict[str, Any]], prefix: Path, command: str) -> Path:
    """Write the figures of all runs, their table and their picture; returns the table's path."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    where = environment(torch.device("cpu")) | {"command": without_secrets(command)}
    _beside(prefix, ".json").write_text(json.dumps({"environment": where, "runs": figures}, indent=1))
    plot(figures, ablation, _beside(prefix, ".png"))
    text = [f"# {ablation.title}\n\n    {where['command']}\n", markdown(figures)]
    for one, other in ablation.compared:
        if {one, other} <= over_seeds(figures).keys():
            for key in known(figures, ("auroc", "leakage", "knn", "logreg")):
                mean, deviation = difference(figures, one, other, key)
                text.append(f"- {one} - {other}, {key}: {mean:+.3f} ± {deviation:.3f} (same seed)")
    if views := views_markdown(figures):
        text.append(f"\n{_OF_VIEWS}\n\n{views}")
    seeds = len({run["seed"] for run in figures})
    machine = f"{where['device']}, torch {where['torch']}, commit {where['commit']}."
    text.append(f"\nMean ± standard deviation over {seeds} seeds. {machine}\n\n![scores]({prefix.name}.png)\n")
    path = _beside(prefix, ".md")
    path.write_text("\n".join(text))
    return path
