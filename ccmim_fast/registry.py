"""The registries of what a run can choose by name: image sources, loaders, score sources, contrastive losses, targets.

Nothing here imports torch: the settings' choices, `--help` and the tables of the benchmarks are made from these
registries alone, and the class behind a name is imported when it is built. Nothing else in the tree lists the names.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple


def load(path: str) -> Any:
    """Import what `module:name` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


class ImageSource(NamedTuple):
    """A kind of images to train on."""

    path: str  # `module:name` of a function of the settings `data` and the seed that returns a `data.source.Source`
    channels: int = 0  # the only number of channels that its images can have; 0: any


class ScoreSource(NamedTuple):
    """A place where [CLS]'s attention to the patches is read."""

    label: str  # for tables and reports
    path: str  # `module:name` of the class, see `models.scores`
    # Arithmetic of one image's scores beside the two training passes, of (patches L, width D, depth n, index of the
    # block that is read): a product of [m, k] and [k, n] counts 2 m k n.
    flops: Callable[[int, int, int, int], float]
    has_bank: bool = False  # scores are kept per sample between steps, from both training passes: needs a contrast
    runs_blocks: bool = False  # without gradient: autocast must not keep their cast weights for training


class Contrast(NamedTuple):
    """A loss between the [CLS] tokens of the visible and of the masked set."""

    label: str  # for tables and reports
    path: str = ""  # `module:name` of the criterion, see `losses.criteria`; empty: none, and no masked branch
    predictor: bool = False  # the visible set's projection passes a predictor (Eq. 8)
    negatives: str = ""  # whose projections of all ranks a rank compares with: `visible`, `masked`, or empty


class Target(NamedTuple):
    """A target is what the decoder predicts of a masked patch."""

    label: str  # for tables and reports
    path: str  # `module:name` of the criterion, see `losses.criteria`


def _block(tokens: int, width: int) -> float:
    """Count the forward FLOPs of a transformer block: products 24 T D^2, attention 4 T^2 D."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def _keys(tokens: int, width: int) -> float:
    """Count the keys of all tokens and the query of [CLS]."""
    return 2 * (tokens + 1) * width**2


IMAGE_SOURCES: dict[str, ImageSource] = {
    "images": ImageSource("ccmim_fast.data.index.indexed:build"),
    "shapes": ImageSource("ccmim_fast.data.made.shapes:build", channels=3),
    "photos": ImageSource("ccmim_fast.data.made.photos:build", channels=3),
}

# Ways to read, decode and crop images, by `module:name` of their classes (see `data.build.Loader`): `data.loader=auto`
# takes the first one that suits the images.
LOADERS = {
    "dali": "ccmim_fast.data.stream.dali_loader:DaliLoader",
    "torch": "ccmim_fast.data.stream.torch_loader:TorchLoader",
}

SCORE_SOURCES: dict[str, ScoreSource] = {
    "first": ScoreSource("first block", "ccmim_fast.models.scores:FirstBlock", lambda L, D, n, k: 2 * L * D),
    "block": ScoreSource(
        "one block",
        "ccmim_fast.models.scores:OneBlock",
        lambda L, D, n, k: k * _block(L + 1, D) + _keys(L + 1, D) + 2 * (L + 1) * D,
        runs_blocks=True,
    ),
    "all": ScoreSource(
        "all blocks",
        "ccmim_fast.models.scores:AllBlocks",
        # Of the last block the keys alone; a row of [CLS] against all tokens in every block.
        lambda L, D, n, k: (n - 1) * _block(L + 1, D) + _keys(L + 1, D) + n * 2 * (L + 1) * D,
        runs_blocks=True,
    ),
    "bank": ScoreSource(
        "score bank",
        "ccmim_fast.models.scores:Bank",
        # Rows of [CLS] in both passes, and Eq. 4 at the first block for what the bank does not know.
        lambda L, D, n, k: n * 2 * (L + 2) * D + 2 * L * D,
        has_bank=True,
    ),
}

CONTRASTS: dict[str, Contrast] = {
    "nce": Contrast("NCE (Eq. 7)", "ccmim_fast.losses.criteria:InfoNCE", negatives="visible"),
    "align": Contrast("align (Eq. 8)", "ccmim_fast.losses.criteria:Align", predictor=True),
    "moco": Contrast("authors' code", "ccmim_fast.losses.criteria:MoCo", negatives="masked"),
    "none": Contrast("none"),
}

TARGETS: dict[str, Target] = {
    "pixels": Target("pixels", "ccmim_fast.losses.criteria:Pixels"),
    "hog": Target("HOG features", "ccmim_fast.losses.criteria:Hog"),
}
