"""Segmentation: UPerNet on the encoder, all weights trained on pixels' labels; mIoU on whole images."""

# B batch, C channels, H height, W width, K classes, R losses

import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ccmim_fast.config.evaluation import EvalConfig, images_of
from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.source import usable_count, usable_ids
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.errors import ConfigError, DataError
from ccmim_fast.evaluation.finetune import build_optimizer
from ccmim_fast.evaluation.images import Images
from ccmim_fast.evaluation.job import Job
from ccmim_fast.evaluation.segmentation.batches import Batch, Batches
from ccmim_fast.evaluation.segmentation.build import build_segmenter
from ccmim_fast.evaluation.segmentation.figures import confusion, figures_of
from ccmim_fast.evaluation.segmentation.model import Segmenter
from ccmim_fast.evaluation.segmentation.scenes import IGNORED, folder_scenes, shape_scenes
from ccmim_fast.evaluation.segmentation.transforms import Augment, pair_of, scaled
from ccmim_fast.evaluation.segmentation.upernet import check_installed
from ccmim_fast.evaluation.segmentation.windows import slide
from ccmim_fast.evaluation.supervised import Learner, Training


def open_scenes(config: EvalConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Images, Images]:
    """The scenes to train on and those to test on; first what needs no image to be found wrong.

    Raises:
        MachineError: the decoder is not installed.
        ConfigError: a setting that segmentation cannot run with.
        DataError: see `folder_scenes`.
    """
    check_installed()
    mean, std = config.data.mean or mean, config.data.std or std
    _check(config, mean, std)
    data = [images_of(config.data, mean, std, test) for test in (False, True)]
    if config.data.source == "shapes":
        scenes = [shape_scenes(of_these, config.seed + test) for test, of_these in enumerate(data)]
    else:
        scenes = folder_scenes(config.data.root)
    train, test = map(Images, scenes, data)
    return train, test


def _check(config: EvalConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    segment, window = config.segment, config.data.image_size
    if config.optim.name != "adamw":
        raise ConfigError(f"optim.name={config.optim.name}: segmentation has adamw; nearest valid is adamw")
    for key, values in (("mean", mean), ("std", std)):
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


def run(job: Job) -> dict[str, float]:
    """Train all weights; mIoU, aAcc and mAcc of the end, see `figures_of`."""
    config, here = job.config, job.here
    model = build_segmenter(job)
    plan = Plan(
        job.train.source, config.seed, config.train.batch_size, config.train.accumulate, here.rank, here.world_size
    )
    augment = Augment(
        size=config.data.image_size,
        sides=config.segment.sides,
        ratio=config.segment.ratio,
        most=config.segment.most,
        flip=config.data.flip,
        colour=tuple(round(255 * value) for value in job.weights.mean),
    )
    scenes, data = job.train.source, job.train.data
    bad_samples = BadSamples.of(scenes, data.on_error, data.max_bad)
    batches = Batches(plan, bad_samples, augment, data.workers, here.device)

    def losses(module: nn.Module, batch: Batch) -> Tensor:
        logits_BKHW, auxiliary_BKHW = module(batch.images_BCHW)
        main, auxiliary = (pixel_loss(logits, batch.labels_BHW) for logits in (logits_BKHW, auxiliary_BKHW))
        return (main + config.segment.auxiliary_weight * auxiliary)[None]

    optimizer = build_optimizer(model, config.optim)
    return Training(job, Learner(model, losses, optimizer, batches.stream, lambda: tested(job, model))).run()


def pixel_loss(logits_BKHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Cross-entropy summed over the pixels that have a class, divided by the number of all (mmsegmentation)."""
    return F.cross_entropy(logits_BKHW.float(), labels_BHW.long(), ignore_index=IGNORED, reduction="none").mean()


def tested(job: Job, model: Segmenter) -> dict[str, float]:
    """mIoU, aAcc and mAcc over all test images of all ranks; the model is in eval mode, without gradient.

    Raises:
        DataError: none of their pixels has a class.
    """
    config, here, scenes = job.config, job.here, job.test.source
    at_once = max(1, config.train.batch_size // (config.train.accumulate * here.world_size))
    confusion_KK = torch.zeros(job.test.classes, job.test.classes, dtype=torch.int64, device=here.device)
    for index in usable_ids(scenes, np.arange(here.rank, usable_count(scenes), here.world_size)).tolist():
        pair = pair_of(scenes, index, scenes.decode(index))
        image_CHW = pair.resized(scaled(pair.size, (config.segment.sides[0], math.inf))).image_CHW.to(here.device)
        logits_KHW = slide(model, image_CHW, config.data.image_size, config.segment.stride, at_once)
        logits_1KHW = F.interpolate(logits_KHW[None], pair.size, mode="bilinear", align_corners=False)
        confusion_KK += confusion(pair.labels_HW.to(here.device), logits_1KHW[0].argmax(0), job.test.classes)
    if dist.is_initialized():
        dist.all_reduce(confusion_KK)
    if not confusion_KK.any():
        raise DataError(f"{config.data.root}: no pixel of the {usable_count(scenes)} images to test on has a class")
    return figures_of(confusion_KK)
