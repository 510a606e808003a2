"""Segmentation: UPerNet on the encoder, all weights trained on pixels' labels; mIoU on whole images."""

# B batch, C channels, H height, W width, K classes, R losses

import torch.nn.functional as F
from torch import Tensor, nn

from ccmim_fast.config.evaluation import EvalConfig, images_of
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.finetune import build_optimizer
from ccmim_fast.evaluation.images import Images
from ccmim_fast.evaluation.job import Job
from ccmim_fast.evaluation.segmentation.metrics import segmentation_figures
from ccmim_fast.evaluation.segmentation.model import build_segmenter, check_installed
from ccmim_fast.evaluation.segmentation.scenes import IGNORED, folder_scenes, shape_scenes
from ccmim_fast.evaluation.segmentation.transforms import SceneBatch, SceneLoader
from ccmim_fast.evaluation.supervised import Learner, train


def open_images(config: EvalConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Images, Images]:
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
    config, model = job.config, build_segmenter(job)

    def losses(module: nn.Module, batch: SceneBatch) -> Tensor:
        logits_BKHW, auxiliary_BKHW = module(batch.images_BCHW)
        main, auxiliary = (pixel_loss(logits, batch.labels_BHW) for logits in (logits_BKHW, auxiliary_BKHW))
        return (main + config.segment.auxiliary_weight * auxiliary)[None]

    optimizer = build_optimizer(model, config.optim)
    return train(job, Learner(model, losses, optimizer, SceneLoader(job), lambda: segmentation_figures(job, model)))


def pixel_loss(logits_BKHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Cross-entropy summed over the pixels that have a class, divided by the number of all (mmsegmentation)."""
    return F.cross_entropy(logits_BKHW.float(), labels_BHW.long(), ignore_index=IGNORED, reduction="none").mean()
