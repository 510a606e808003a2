"""Segmentation: UPerNet on the encoder, all weights trained on pixels' labels; mIoU on whole images."""

# B batch, N windows, C channels, H height, W width of an image, h w of a window, K classes, R losses

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.source import usable_count, usable_ids
from ccmim_fast.errors import ConfigError, DataError
from ccmim_fast.evaluation.finetune import build_optimizer
from ccmim_fast.evaluation.images import round_pixels_
from ccmim_fast.evaluation.job import Job, Work
from ccmim_fast.evaluation.loader import samples_to_test
from ccmim_fast.evaluation.segmentation.model import build_segmenter
from ccmim_fast.evaluation.segmentation.scenes import IGNORED, Scenes, folder_scenes, shape_scenes
from ccmim_fast.evaluation.segmentation.transforms import SceneBatch, SceneLoader, pair_of, scaled
from ccmim_fast.evaluation.supervised import Supervised


def open_images(config: EvalConfig, *data: DataConfig) -> Sequence[Scenes]:
    """Open the scenes to train on and those to test on; first what needs no image to be found wrong.

    Raises ConfigError: a setting that segmentation cannot run with; DataError: see `folder_scenes`.
    """
    segment, window = config.segment, config.data.image_size
    for key, values in (("mean", data[0].mean), ("std", data[0].std)):
        if len(values) != 3:
            raise ConfigError(f"data.{key}={list(values)}: segmentation needs images of 3 channels, so 3 values")
    if segment.sides[0] < max(window):
        near = [max(window), max(*window, segment.sides[1])]
        raise ConfigError(
            f"segment.sides={list(segment.sides)}: the short one must hold a window of "
            f"data.image_size={list(window)}; nearest valid is {near}"
        )
    if segment.stride > min(window):
        raise ConfigError(
            f"segment.stride={segment.stride}: windows of data.image_size={list(window)} must touch; "
            f"nearest valid is {min(window)}"
        )
    if config.data.source == "shapes":
        return [shape_scenes(of_these, (config.seed + number) % 2**32) for number, of_these in enumerate(data)]
    return folder_scenes(config.data.root)


class Segmentation(Supervised):
    """This run trains a `Segmenter`."""

    def losses(self, batch: SceneBatch) -> Tensor:
        """Return [1], the loss of the classifier and, by its weight, of the auxiliary one."""
        main, auxiliary = (pixel_loss(logits_BKHW, batch.labels_BHW) for logits_BKHW in self.wrapped(batch.images_BCHW))
        return (main + self.config.segment.auxiliary_weight * auxiliary)[None]

    def test(self) -> dict[str, float]:
        """Return mIoU, aAcc and mAcc, see `figures_of`. Raises DataError: none of the pixels has a class."""
        config, here, scenes, classes = self.config, self.here, self.job.test.source, self.job.test.classes
        windows = config.data.image_size, config.segment.stride, self.loader.plan.micro_batch_size

        def read(index: int) -> tuple[Tensor, Tensor]:
            """Return an image in the size in which it is shown, and the labels of the original."""
            pair = pair_of(*scenes.sample(index))
            image_CHW, _ = pair.resized(scaled(pair.size, (config.segment.sides[0], math.inf)))
            return image_CHW.as_subclass(Tensor), pair.labels_HW.as_subclass(Tensor)

        confusion_KK = torch.zeros(classes, classes, dtype=torch.int64, device=here.device)
        for image_CHW, labels_HW in (shown for samples in samples_to_test(self.job, read) for shown in samples):
            logits_KHW = slide(self.model, image_CHW.to(here.device), *windows)
            logits_1KHW = F.interpolate(logits_KHW[None], labels_HW.shape, mode="bilinear", align_corners=False)
            confusion_KK += confusion(labels_HW.to(here.device), logits_1KHW[0].argmax(0), classes)
        if dist.is_initialized():
            dist.all_reduce(confusion_KK)
        if not confusion_KK.any():
            raise DataError(f"{config.data.root}: no image to test on that has a class can be read any more")
        return figures_of(confusion_KK)


def prepare(job: Job) -> Work:
    """Prepare the training of all weights, to mIoU, aAcc and mAcc of the end.

    Raises DataError: no image to test on has a pixel of a class.
    """
    scenes = job.test.source
    if not any(map(scenes.has_class, usable_ids(scenes, np.arange(usable_count(scenes))).tolist())):
        root = job.config.data.root
        raise DataError(f"{root}: no pixel of the {usable_count(scenes)} images to test on has a class")
    model = build_segmenter(job)
    round_pixels_((job.train, job.test), job.here)
    optimizer = build_optimizer(model.vit, job.config.optim, *model.new_parts())
    return Segmentation(job, model, optimizer, SceneLoader(job)).run


def pixel_loss(logits_BKHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Return the cross-entropy summed over pixels that have a class, divided by the number of all (mmsegmentation)."""
    return F.cross_entropy(logits_BKHW.float(), labels_BHW.long(), ignore_index=IGNORED, reduction="none").mean()


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
