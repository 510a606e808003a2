"""The moments of `ccmim eval masks` become files: pictures, result.json and result.md."""

# B images, L patches

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccmim_fast.config.keys import flatten
from ccmim_fast.evaluation.masks.moment import HEADINGS, Moment, moments_png, strategies_png
from ccmim_fast.evaluation.masks.scores import of_scores
from ccmim_fast.runs.folder import environment

STRATEGIES_FILE, MOMENTS_FILE = "masks.png", "moments.png"
MEANING = """auroc: in how many pairs of an object patch and another one the object's has the higher score; 0.5 where
scores know nothing of objects. leakage: object patches left visible, relative to random masking, which is 1. recons:
L_recons under these masks. entropy: of the scores, as a share of log L; 1 where all patches are alike. top quarter:
what the highest 25 % of the patches have together; 0.25 where all are alike."""


def write(folder: Path, moments: Sequence[Moment], object_BL: Tensor | None, device: torch.device) -> str:
    """Write pictures and tables of the last moment, and of all where there are several; returns what to print.

    Args:
        object_BL: bool, patches of the images that show the object; None where that is not known.
    """
    last = moments[-1]
    pictures = {STRATEGIES_FILE: strategies_png(last)}
    if len(moments) > 1:
        pictures[MOMENTS_FILE] = moments_png(moments)
    for name, png in pictures.items():
        (folder / name).write_bytes(png)
    remarks, by_scores = [], last.config.mask.strategy.startswith("importance")
    if by_scores and last.config.score.source == "bank" and last.scored.source != "bank":
        remarks = ["score.source=bank: the bank knows nothing of these images; scores of all blocks stand in for it"]
    result: dict[str, Any] = {
        "evaluation": "masks",
        "checkpoint": last.name,
        "step": last.step,
        "arch": last.config.model.arch,
        "figures": last.figures,
        "chance": None,
        "scores": last.scored.source,
        "sources": {name: of_scores(scores, object_BL) for name, scores in last.scored.scores.items()},
        "moments": [{"step": one.step, "epoch": one.epoch, "figures": one.figures} for one in moments],
        "deviations": remarks,
        "images": f"{len(last.scored.masks['random'])} images, {last.config.mask.ratio:.0%} of their patches masked",
        "pictures": list(pictures),
        "config": flatten(last.config),
        "environment": environment(device),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "result.md").write_text(_page(result))
    figures = ", ".join(f"{key} {value:.3g}" for key, value in last.figures.items())
    said = f"masks of {last.name}, scores of {last.scored.source}, {result['images']}: {figures}"
    return "\n".join([said, *remarks, f"{folder}: {', '.join(['result.md', *pictures])}"])


def _page(result: dict[str, Any]) -> str:
    figures = result["figures"]
    strategies = {strategy: {} for strategy in HEADINGS}
    for name, value in figures.items():
        key, _, strategy = name.partition(", ")
        strategies.get(strategy, {})[key] = value
    parts = [f"# Masks of {result['checkpoint']}", *(f"![{name}]({name})" for name in result["pictures"])]
    parts.append(f"Masks are drawn by the scores of {result['scores']}. {result['images']}.")
    parts += [*result["deviations"], _table("strategy", strategies), _table("scores", result["sources"])]
    if len(result["moments"]) > 1:
        parts.append(_table("epoch", {str(moment["epoch"]): moment["figures"] for moment in result["moments"]}))
    where = result["environment"]
    parts += [MEANING, f"{where['device']}, torch {where['torch']}, commit {where['commit']}."]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(name: str, rows: dict[str, dict[str, float]]) -> str:
    """Return a table in Markdown; nothing without figures."""
    keys = list(next(iter(rows.values())))
    lines = [[name, *keys], ["---"] * (1 + len(keys))]
    lines += [[row, *(f"{value:.3f}" for value in figures.values())] for row, figures in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if keys else ""
