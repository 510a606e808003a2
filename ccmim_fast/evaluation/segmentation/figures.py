"""mIoU, mean and total accuracy of pixels, from counts of what was named what."""

# K classes

import torch
from torch import Tensor

from ccmim_fast.evaluation.segmentation.scenes import IGNORED


def confusion(labels: Tensor, named: Tensor, classes: int) -> Tensor:
    """How many pixels of class i were named j, [K, K] int64; `IGNORED` ones do not count.

    Args:
        labels: integers of any shape, 0 .. K - 1 or `IGNORED`.
        named: integers of the same shape, 0 .. K - 1.
    """
    counts = labels != IGNORED
    cells = labels[counts].long() * classes + named[counts].long()
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def figures_of(confusion_KK: Tensor) -> dict[str, float]:
    """mIoU and mAcc are means over classes: of those that occur in labels or answers, and of those in labels.

    mIoU: a class's pixels that are named right, of those that are it or are named it. mAcc: of those that are it. aAcc:
    of all pixels, of which there must be one.
    """
    counts_KK = confusion_KK.double()
    right_K, labelled_K, named_K = counts_KK.diagonal(), counts_KK.sum(1), counts_KK.sum(0)
    union_K = labelled_K + named_K - right_K
    return {
        "mIoU": (right_K / union_K)[union_K > 0].mean().item(),
        "aAcc": (right_K.sum() / labelled_K.sum()).item(),
        "mAcc": (right_K / labelled_K)[labelled_K > 0].mean().item(),
    }
