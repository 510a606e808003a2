"""Segmentation: UPerNet on the encoder, all weights trained on pixels' labels; mIoU on whole images."""

# B batch, C channels, H height, W width, K classes, R losses

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.schema import DataConfig
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.finetune import build_optimizer
from ccmim_fast.evaluation.job import Job
from ccmim_fast.evaluation.segmentation.metrics import segmentation_figures
from ccmim_fast.evaluation.segmentation.model import build_segmenter
from ccmim_fast.evaluation.segmentation.scenes import IGNORED, Scenes, folder_scenes, shape_scenes
from ccmim_fast.evaluation.segmentation.transforms import SceneBatch, SceneLoader
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
        return [shape_scenes(of_these, config.seed + number) for number, of_these in enumerate(data)]
    return folder_scenes(config.data.root)


class Segmentation(Supervised):
    """This run trains a `Segmenter`."""

    def losses(self, batch: SceneBatch) -> Tensor:
        """Return [1], the loss of the classifier and, by its weight, of the auxiliary one."""
        main, auxiliary = (pixel_loss(logits_BKHW, batch.labels_BHW) for logits_BKHW in self.wrapped(batch.images_BCHW))
        return (main + self.config.segment.auxiliary_weight * auxiliary)[None]

    def test(self) -> dict[str, float]:
        """Return mIoU, aAcc and mAcc, see `figures_of`."""
        return segmentation_figures(self.job, self.model, self.loader.plan.micro_batch_size)


def run(job: Job) -> dict[str, float]:
    """Train all weights; returns mIoU, aAcc and mAcc of the end."""
    model = build_segmenter(job)
    optimizer = build_optimizer(model.vit, job.config.optim, *model.new_parts())
    return Segmentation(job, model, optimizer, SceneLoader(job)).run()


def pixel_loss(logits_BKHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Return the cross-entropy summed over pixels that have a class, divided by the number of all (mmsegmentation)."""
    return F.cross_entropy(logits_BKHW.float(), labels_BHW.long(), ignore_index=IGNORED, reduction="none").mean()
