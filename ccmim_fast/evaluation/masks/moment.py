"""A moment is what `ccmim eval masks` sees of a checkpoint; moments are drawn as figures (paper, Figure 3a)."""

# D images drawn, H height, W width, C channels

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ccmim_fast.config.schema import Config
from ccmim_fast.evaluation.masks.scores import Scored
from ccmim_fast.report.figure import Column, figure_png
from ccmim_fast.report.pictures import heatmap, visible_set

HEADINGS = {
    "random": "random",
    "block": "block-wise",
    "importance": "importance",
    "importance_sampling": "importance\nsampling",
}
OUTLINE = "White: patches of the object."
NORM_PIX = (
    "Mean and contrast of each reconstructed patch are the true ones: the model predicts neither (target.norm_pix)."
)


class Moment(NamedTuple):
    """This tuple holds scores, masks and figures of all images that were measured, and some images to be drawn.

    `reconstruction_DHWC` is from what the run's own strategy leaves visible; None where no pixels are predicted.
    """

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
    reconstruction_DHWC: np.ndarray | None  # uint8

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
    notes = [] if moment.object_DL is None else [OUTLINE]
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
