"""What a model looks at and hides, as figures: its strategies side by side, and its checkpoints (paper, Figure 3a)."""

# D images drawn, H height, W width, C channels

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ccmim_fast.evaluation.masks.scored import Scored
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


class Drawn(NamedTuple):
    """A few images at one moment of a run.

    Attributes:
        moment: such as "epoch 4"; nothing where nobody knows.
        images_DHWC: uint8.
        grid: rows and columns of patches.
        scored: of these images.
        figures: of all images that were measured, see `evaluation.scored.figures_of`.
        object_DL: bool, patches that show the object; None where that is not known.
        reconstruction_DHWC: uint8, from the visible patches of `strategy`; None where no pixels are predicted.
        strategy: the run's own.
    """

    moment: str
    images_DHWC: np.ndarray
    grid: tuple[int, int]
    scored: Scored
    figures: dict[str, float]
    object_DL: np.ndarray | None
    reconstruction_DHWC: np.ndarray | None
    strategy: str

    def score_maps(self) -> Column:
        """A column of the scores that the masks are drawn by, the object outlined."""
        (H, W), (rows, columns) = self.images_DHWC.shape[1:3], self.grid
        maps = [heatmap(scores_L.numpy(), self.grid, (H, W)) for scores_L in self.scored.scores[self.scored.source]]
        pixels = np.ones((H // rows, W // columns), dtype=bool)
        objects = () if self.object_DL is None else self.object_DL
        outlined = [np.kron(object_L.reshape(self.grid), pixels) for object_L in objects]
        return Column(f"scores\n({self.scored.source})", self.words("auroc"), maps, outlined)

    def visible(self, strategy: str, heading: str, *keys: str) -> Column:
        """A column of the visible sets, under it some of the figures."""
        masks = self.scored.masks[strategy].numpy()
        pictures = [visible_set(image_HWC, mask_L, self.grid) for image_HWC, mask_L in zip(self.images_DHWC, masks)]
        return Column(heading, self.words(*keys), pictures)

    def words(self, *keys: str) -> str:
        """Those of the figures that there are, a line each."""
        named = {"auroc": "AUROC", "recons": "loss"}
        known = {key: key.partition(",")[0] for key in keys if key in self.figures}
        return "\n".join(f"{named.get(what, what)} {self.figures[key]:.2f}" for key, what in known.items())


def strategies_png(drawn: Drawn, norm_pix: bool) -> bytes:
    """A row an image: the image, its scores, what each strategy leaves visible, the reconstruction."""
    columns = [Column("image", "", drawn.images_DHWC), drawn.score_maps()]
    columns += [drawn.visible(strategy, heading, f"leakage, {strategy}") for strategy, heading in HEADINGS.items()]
    notes = [] if drawn.object_DL is None else [OUTLINE]
    if drawn.reconstruction_DHWC is not None:
        under = drawn.words(f"recons, {drawn.strategy}")
        of_which = HEADINGS[drawn.strategy].rpartition("\n")[2]
        columns.append(Column(f"reconstruction\n({of_which})", under, drawn.reconstruction_DHWC))
        notes += [NORM_PIX] * norm_pix
    return figure_png(columns, " ".join(notes))


def moments_png(moments: Sequence[Drawn]) -> bytes:
    """A row an image: the image, and what importance sampling leaves visible of it at each moment of a run; at last,
    what importance alone leaves (paper, Figure 3a)."""
    by = "importance_sampling"
    columns = [Column("image", "", moments[0].images_DHWC)]
    columns += [drawn.visible(by, drawn.moment, "auroc", f"leakage, {by}") for drawn in moments]
    last = moments[-1]
    return figure_png([*columns, last.visible("importance", f"{last.moment},\nimportance", "leakage, importance")])
