"""What was seen, as pictures, result.json and result.md."""

# B images, L patches

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccmim_fast.config.keys import flatten
from ccmim_fast.config.schema import Config
from ccmim_fast.evaluation.masks.picture import HEADINGS, Drawn, moments_png, strategies_png
from ccmim_fast.evaluation.masks.scored import Scored, of_scores
from ccmim_fast.runs.folder import environment

STRATEGIES_FILE, MOMENTS_FILE = "masks.png", "moments.png"
MEANING = """auroc: in how many pairs of an object patch and another one the object's has the higher score; 0.5 where
scores know nothing of objects. leakage: object patches left visible, relative to random masking, which is 1. recons:
L_recons under these masks. entropy: of the scores, as a share of log L; 1 where all patches are alike. top quarter:
what the highest 25 % of the patches have together; 0.25 where all are alike."""


class Look(NamedTuple):
    """What was seen at one moment: scores and figures of all images, and a few of them to be drawn.

    Attributes:
        name: the checkpoint, for people.
        step, epoch: trained so far; None where nobody knows.
    """

    name: str
    config: Config
    step: int | None
    epoch: float | None
    scored: Scored
    figures: dict[str, float]
    drawn: Drawn


def write(folder: Path, looks: Sequence[Look], object_BL: Tensor | None, device: torch.device) -> str:
    """Write pictures and tables of the last look, and of all where there are several; returns what to print.

    Args:
        object_BL: bool, patches of the images that show the object; None where that is not known.
    """
    last = looks[-1]
    pictures = {STRATEGIES_FILE: strategies_png(last.drawn, last.config.target.norm_pix)}
    if len(looks) > 1:
        pictures[MOMENTS_FILE] = moments_png([look.drawn for look in looks])
    for name, png in pictures.items():
        (folder / name).write_bytes(png)
    result: dict[str, Any] = {
        "evaluation": "masks",
        "checkpoint": last.name,
        "step": last.step,
        "arch": last.config.model.arch,
        "figures": last.figures,
        "chance": None,
        "scores": last.scored.source,
        "sources": {name: of_scores(scores, object_BL) for name, scores in last.scored.scores.items()},
        "moments": [{"step": one.step, "epoch": one.epoch, "figures": one.figures} for one in looks],
        "deviations": _remarks(last),
        "images": f"{len(last.scored.masks['random'])} images, {last.config.mask.ratio:.0%} of their patches masked",
        "pictures": list(pictures),
        "config": flatten(last.config),
        "environment": environment(device),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "result.md").write_text(_page(result))
    figures = ", ".join(f"{key} {value:.3g}" for key, value in last.figures.items())
    said = f"masks of {last.name}, scores of {last.scored.source}, {result['images']}: {figures}"
    return "\n".join([said, *_remarks(last), f"{folder}: {', '.join(['result.md', *pictures])}"])


def _remarks(look: Look) -> list[str]:
    """In what this is not what the run does."""
    scored = look.config.mask.strategy.startswith("importance")
    if scored and look.config.score.source == "bank" and look.scored.source != "bank":
        return ["score.source=bank: the bank knows nothing of these images; scores of all blocks stand in for it"]
    return []


def _page(result: dict[str, Any]) -> str:
    figures = result["figures"]
    strategies = {
        strategy: {
            key: figures[f"{key}, {strategy}"] for key in ("leakage", "recons") if f"{key}, {strategy}" in figures
        }
        for strategy in HEADINGS
    }
    parts = [f"# Masks of {result['checkpoint']}", *(f"![{name}]({name})" for name in result["pictures"])]
    parts.append(f"Masks are drawn by the scores of {result['scores']}. {result['images']}.")
    parts += [*result["deviations"], _table("strategy", strategies), _table("scores", result["sources"])]
    if len(result["moments"]) > 1:
        parts.append(_table("epoch", {str(moment["epoch"]): moment["figures"] for moment in result["moments"]}))
    where = result["environment"]
    parts += [MEANING, f"{where['device']}, torch {where['torch']}, commit {where['commit']}."]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(name: str, rows: dict[str, dict[str, float]]) -> str:
    """Markdown; nothing without figures."""
    keys = list(next(iter(rows.values())))
    lines = [[name, *keys], ["---"] * (1 + len(keys))]
    lines += [[row, *(f"{value:.3f}" for value in figures.values())] for row, figures in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if keys else ""
