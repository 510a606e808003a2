"""Segmentation's test: whole images by overlapping windows, and mIoU, mean and total accuracy of their pixels."""

# N windows, C channels, H height, W width of an image, h w of a window, K classes

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ccmim_fast.data.source import usable_count
from ccmim_fast.errors import DataError
from ccmim_fast.evaluation.job import Job
from ccmim_fast.evaluation.loader import samples_to_test
from ccmim_fast.evaluation.segmentation.scenes import IGNORED
from ccmim_fast.evaluation.segmentation.transforms import pair_of, scaled


def segmentation_figures(job: Job, model: nn.Module, at_once: int) -> dict[str, float]:
    """Return mIoU, aAcc and mAcc over the test images of all ranks; the model is in eval mode, without gradient.

    The model is given `at_once` windows at most. Raises DataError: none of the pixels has a class.
    """
    config, here, scenes, classes = job.config, job.here, job.test.source, job.test.classes

    def read(index: int) -> tuple[Tensor, Tensor]:
        """Return an image in the size in which it is shown, and the labels of the original."""
        pair = pair_of(scenes, index, scenes.decode(index))
        image_CHW, _ = pair.resized(scaled(pair.size, (config.segment.sides[0], math.inf)))
        return image_CHW.as_subclass(Tensor), pair.labels_HW.as_subclass(Tensor)

    confusion_KK = torch.zeros(classes, classes, dtype=torch.int64, device=here.device)
    for image_CHW, labels_HW in (shown for samples in samples_to_test(job, read) for shown in samples):
        logits_KHW = slide(model, image_CHW.to(here.device), config.data.image_size, config.segment.stride, at_once)
        logits_1KHW = F.interpolate(logits_KHW[None], labels_HW.shape, mode="bilinear", align_corners=False)
        confusion_KK += confusion(labels_HW.to(here.device), logits_1KHW[0].argmax(0), classes)
    if dist.is_initialized():
        dist.all_reduce(confusion_KK)
    if not confusion_KK.any():
        raise DataError(f"{config.data.root}: no pixel of the {usable_count(scenes)} images to test on has a class")
    return figures_of(confusion_KK)


def slide(
    predict: Callable[[Tensor], Tensor], image_CHW: Tensor, window: tuple[int, int], stride: int, at_once: int
) -> Tensor:
    """Return the mean of all windows' logits at each pixel, [K, H, W], float32 at least.

    Windows (h, w) are `stride` pixels apart, no more than their sides; the last ones of rows and columns end with the
    image (mmsegmentation), which is as large as a window at least. `predict` turns [N, C, h, w] into logits [N, K, h,
    w]; N is `at_once` at most.
    """
    (h, w), (H, W) = window, image_CHW.shape[1:]
    tops, lefts = ([*range(0, side - of, stride), side - of] for side, of in ((H, h), (W, w)))
    places = [(y, x) for y in tops for x in lefts]
    summed_KHW, counts_HW = 0, torch.zeros(H, W, device=image_CHW.device)
    for first in range(0, len(places), at_once):
        some = places[first : first + at_once]
        logits_NKhw = predict(torch.stack([image_CHW[:, y : y + h, x : x + w] for y, x in some]))
        if first == 0:
            dtype = torch.promote_types(logits_NKhw.dtype, torch.float32)
            summed_KHW = logits_NKhw.new_zeros((logits_NKhw.shape[1], H, W), dtype=dtype)
        for (y, x), logits_Khw in zip(some, logits_NKhw):
            summed_KHW[:, y : y + h, x : x + w] += logits_Khw
            counts_HW[y : y + h, x : x + w] += 1
    return summed_KHW / counts_HW


def confusion(labels: Tensor, named: Tensor, classes: int) -> Tensor:
    """Count the pixels of class i that were named j, [K, K] int64; of any shape; `IGNORED` ones do not count."""
    counts = labels != IGNORED
    cells = labels[counts].long() * classes + named[counts].long()
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def figures_of(confusion_KK: Tensor) -> dict[str, float]:
    """Return mIoU and mAcc, means over the classes in labels or answers and over those in labels, and aAcc.

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
