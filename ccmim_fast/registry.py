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
    """A kind of images to train on.

    Attributes:
        label: for tables and reports.
        path: `module:name` of a function of the settings `data` and the seed that returns a `data.source.Source`.
        channels: the only number of channels that its images can have; 0: any.
    """

    label: str
    path: str
    channels: int = 0


class Loader(NamedTuple):
    """A way to read, decode and crop images.

    Attributes:
        label: for tables and reports.
        path: `module:name` of the class, see `data.build.Loader`.
    """

    label: str
    path: str


class ScoreSource(NamedTuple):
    """A place where [CLS]'s attention to the patches is read.

    Attributes:
        label: for tables and reports.
        path: `module:name` of the class, see `models.scores`.
        flops: arithmetic of one image's scores beside the two training passes, of (patches L, width D, depth n, index
            of the block that is read): a product of [m, k] and [k, n] counts 2 m k n.
        has_bank: the scores are kept per sample between steps; they come from both training passes, so the run needs a
            contrastive loss.
        runs_blocks: scoring runs blocks without gradient: autocast must not keep their cast weights for training.
    """

    label: str
    path: str
    flops: Callable[[int, int, int, int], float]
    has_bank: bool = False
    runs_blocks: bool = False


class Contrast(NamedTuple):
    """A loss between the [CLS] tokens of the visible and of the masked set.

    Attributes:
        label: for tables and reports.
        path: `module:name` of the criterion, see `losses.criteria`; empty: there is none, and no masked branch.
        predictor: the visible set's projection passes a predictor (Eq. 8).
        negatives: whose projections of all ranks a rank compares with: `visible`, `masked`, or empty.
    """

    label: str
    path: str = ""
    predictor: bool = False
    negatives: str = ""


class Target(NamedTuple):
    """A target is what the decoder predicts of a masked patch.

    Attributes:
        label: for tables and reports.
        path: `module:name` of the criterion, see `losses.criteria`.
        drawable: a prediction can be put back into the image.
    """

    label: str
    path: str
    drawable: bool = False


def _block(tokens: int, width: int) -> float:
    """Count the forward FLOPs of a transformer block: products 24 T D^2, attention 4 T^2 D."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def _keys(tokens: int, width: int) -> float:
    """Count the keys of all tokens and the query of [CLS]."""
    return 2 * (tokens + 1) * width**2


IMAGE_SOURCES: dict[str, ImageSource] = {
    "images": ImageSource("image files", "ccmim_fast.data.index.indexed:build"),
    "shapes": ImageSource("generated shapes", "ccmim_fast.data.made.shapes:build", channels=3),
    "photos": ImageSource("crops of eight photographs", "ccmim_fast.data.made.photos:build", channels=3),
}

# `data.loader=auto` takes the first one that suits the images.
LOADERS: dict[str, Loader] = {
    "dali": Loader("NVIDIA DALI", "ccmim_fast.data.stream.dali_loader:DaliLoader"),
    "torch": Loader("Pillow and torch", "ccmim_fast.data.stream.torch_loader:TorchLoader"),
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
    "pixels": Target("pixels", "ccmim_fast.losses.criteria:Pixels", drawable=True),
    "hog": Target("HOG features", "ccmim_fast.losses.criteria:Hog"),
}
