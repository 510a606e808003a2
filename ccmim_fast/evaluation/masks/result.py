"""The moments of `ccmim eval masks` (what it sees of a checkpoint) become pictures, result.json and result.md."""

# B images, D of them drawn, H height, W width, C channels, L patches

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.config.keys import flatten
from ccmim_fast.config.schema import Config
from ccmim_fast.evaluation.masks.scores import Scored, of_scores
from ccmim_fast.report.figure import Column, figure_png
from ccmim_fast.report.pictures import heatmap, visible_set
from ccmim_fast.runs.folder import environment
from ccmim_fast.secrets import without_secrets

HEADINGS = {
    "random": "random",
    "block": "block-wise",
    "importance": "importance",
    "importance_sampling": "importance\nsampling",
}
NORM_PIX = (
    "Mean and contrast of each reconstructed patch are the true ones: the model predicts neither (target.norm_pix)."
)
MEANING = """auroc: in how many pairs of an object patch and another one the object's has the higher score; 0.5 where
scores know nothing of objects. leakage: object patches left visible, relative to random masking, which is 1. recons:
L_recons under these masks. entropy: of the scores, as a share of log L; 1 where all patches are alike. top quarter:
what the highest 25 % of the patches have together; 0.25 where all are alike."""


class Moment(NamedTuple):
    """This tuple holds scores, masks and figures of all images that were measured, and some images to be drawn."""

    name: str  # the checkpoint, for people
    config: Config
    step: int | None  # trained so far; None where nobody knows
    epoch: float | None
    grid: tuple[int, int]  # rows and columns of patches
    scored: Scored
    figures: dict[str, float]  # see `scores.figures_of`
    rows: list[int]  # which of the images are drawn
    images_DHWC: np.ndarray  # uint8
    object_DL: np.ndarray | None  # bool, patches that show the object; None where that is not known
    reconstruction_DHWC: np.ndarray | None  # uint8, from what the run's own strategy leaves visible; None: no pixels

    def score_maps(self) -> Column:
        """Return a column of the scores that the masks are drawn by, the object outlined."""
        (H, W), (rows, columns) = self.images_DHWC.shape[1:3], self.grid
        scores_DL = self.scored.scores[self.scored.source][self.rows].numpy()
        pixels = np.ones((H // rows, W // columns), dtype=bool)
        objects = () if self.object_DL is None else self.object_DL
        outlined = [np.kron(object_L.reshape(self.grid), pixels) for object_L in objects]
        maps = [heatmap(scores_L, self.grid, (H, W)) for scores_L in scores_DL]
        return Column(f"scores\n({self.scored.source})", self._words("auroc"), maps, outlined)

    def visible(self, strategy: str, heading: str, *keys: str) -> Column:
        """Return a column of the visible sets, under it some of the figures."""
        masks_DL = self.scored.masks[strategy][self.rows].numpy()
        pictures = [visible_set(image_HWC, mask_L, self.grid) for image_HWC, mask_L in zip(self.images_DHWC, masks_DL)]
        return Column(heading, self._words(*keys), pictures)

    def reconstruction(self) -> Column:
        strategy = self.config.mask.strategy
        heading = f"reconstruction\n({HEADINGS[strategy].rpartition(chr(10))[2]})"
        return Column(heading, self._words(f"recons, {strategy}"), self.reconstruction_DHWC)

    def _words(self, *keys: str) -> str:
        """Return those of the figures that there are, a line each."""
        named = {"auroc": "AUROC", "recons": "loss"}
        known = {key: key.partition(",")[0] for key in keys if key in self.figures}
        return "\n".join(f"{named.get(what, what)} {self.figures[key]:.2f}" for key, what in known.items())


def strategies_png(moment: Moment) -> bytes:
    """Draw a row an image: the image, its scores, what each strategy leaves visible, the reconstruction."""
    columns = [Column("image", "", moment.images_DHWC), moment.score_maps()]
    columns += [moment.visible(strategy, heading, f"leakage, {strategy}") for strategy, heading in HEADINGS.items()]
    notes = [] if moment.object_DL is None else ["White: patches of the object."]
    if moment.reconstruction_DHWC is not None:
        columns.append(moment.reconstruction())
        notes += [NORM_PIX] * moment.config.target.norm_pix
    return figure_png(columns, " ".join(notes))


def moments_png(moments: Sequence[Moment]) -> bytes:
    """Draw a row an image: the image, what importance sampling leaves visible of it at each moment of a run, and what
    importance alone leaves at the last (paper, Figure 3a)."""
    by = "importance_sampling"
    headings = ["" if moment.epoch is None else f"epoch {round(moment.epoch, 1):g}" for moment in moments]
    columns = [moment.visible(by, text, "auroc", f"leakage, {by}") for moment, text in zip(moments, headings)]
    last = moments[-1].visible("importance", f"{headings[-1]},\nimportance", "leakage, importance")
    return figure_png([Column("image", "", moments[0].images_DHWC), *columns, last])


def write(folder: Path, moments: Sequence[Moment], object_BL: Tensor | None, device: torch.device) -> str:
    """Write pictures and tables of all moments (`object_BL`: patches of objects, if known); returns what to print."""
    last = moments[-1]
    pictures = {"masks.png": strategies_png(last)}
    if len(moments) > 1:
        pictures["moments.png"] = moments_png(moments)
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
    (folder / "result.json").write_text(without_secrets(json.dumps(result, indent=1)) + "\n")
    (folder / "result.md").write_text(without_secrets(_page(result)))
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
