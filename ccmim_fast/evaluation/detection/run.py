"""Object detection and instance segmentation: torchvision's Mask R-CNN on the encoder, all weights trained."""

# N objects, C channels, H height, W width

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.made.shapes import build
from ccmim_fast.data.source import Source
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.detection.batches import ObjectLoader, Targets, resized_to_test
from ccmim_fast.evaluation.detection.detector import build_detector, detect, use_windows_
from ccmim_fast.evaluation.detection.instances import CocoSource, Instances, ShapesInstances, parts_of
from ccmim_fast.evaluation.detection.precision import average_precision
from ccmim_fast.evaluation.encoders import QUARTERS, out_indices
from ccmim_fast.evaluation.finetune import build_optimizer
from ccmim_fast.evaluation.job import Job, Work
from ccmim_fast.evaluation.loader import samples_to_test
from ccmim_fast.evaluation.supervised import Supervised

_SURE = 0.5  # of a pixel of a mask; torchvision's and Detectron's


def open_images(config: EvalConfig, *data: DataConfig) -> list[Source]:
    """Open the images to train on and those to test on.

    Raises DataError: a file is missing or damaged, or classes differ; ConfigError: an encoder that takes no RGB.
    """
    mean, std, root = list(data[0].mean), list(data[0].std), config.data.root
    if len(mean) != 3 or len(std) != 3:
        raise ConfigError(f"data.mean={mean}, data.std={std}: detection has RGB, three values of each")
    if config.data.source == "shapes":
        return [
            build(of_these, (config.seed + number) % 2**32, ShapesInstances) for number, of_these in enumerate(data)
        ]
    first, second = parts_of(root)
    train = CocoSource(root, first, train=True)
    return [train, CocoSource(root, second, train=False, class_names=train.class_names)]


class Detection(Supervised):
    """This run trains a detector."""

    def losses(self, batch: tuple[list[Tensor], Targets]) -> Tensor:
        """Return [1], the sum of the losses of proposals, classes, boxes and masks, of weight 1 each (Mask R-CNN)."""
        return sum(self.wrapped(*batch).values()).float()[None]

    def test(self) -> dict[str, float]:
        """Return average precisions of boxes and masks."""
        return average_precision(found_in_share(self.model, self.job))


def prepare(job: Job) -> Work:
    """Prepare the training of all weights, to average precisions of boxes and masks at the end."""
    model = detector_of(job)
    new = (model.backbone.pyramid, model.rpn, model.roi_heads)
    return Detection(job, model, build_optimizer(model.backbone.vit, job.config.optim, *new), ObjectLoader(job)).run


def detector_of(job: Job) -> nn.Module:
    """Return the detector of a job, on its device. Raises ConfigError: an encoder or settings that do not fit."""
    config, section, size = job.config, job.config.detect, job.config.data.image_size
    vit = job.build_encoder(drop_path=config.model.drop_path, any_size=True, plain=True)
    patch, jitter = vit.patch_embed.patch_size[0], section.resize == "jitter"
    if patch % 4:
        raise ConfigError(f"{job.weights.name}: patches of {patch} pixels; the pyramid needs a multiple of 4")
    if jitter and (size[0] != size[1] or size[0] % (4 * patch)):
        near = max(1, round(size[0] / (4 * patch))) * 4 * patch
        raise ConfigError(
            f"data.image_size={list(size)}: detect.resize=jitter needs a square of a multiple of four patches; "
            f"nearest valid is [{near}, {near}]"
        )
    if section.window and not jitter:
        raise ConfigError(f"detect.window={section.window}: needs images of one size; use detect.resize=jitter")
    if section.window:
        use_windows_(vit, section.window, out_indices(len(vit.blocks), QUARTERS))
    model = build_detector(
        vit,
        job.test.classes,
        kind=section.pyramid,
        width=section.width,
        proposals=section.proposals,
        mean=job.weights.mean,
        std=job.weights.std,
        # With jitter all images are of one size, those to test on padded to it: windows fit a grid that is known.
        pad_to=size[0] if jitter else 4 * patch,
    )
    return model.to(job.here.device)


@torch.no_grad()
def found_in_share(model: nn.Module, job: Job) -> Iterator[tuple[dict[str, Tensor], Instances]]:
    """Yield what the detector finds in each image of this rank's share, and what there is; masks are [N, H, W] bool."""
    config, source = job.config, job.test.source

    def read(index: int) -> tuple[Tensor, Instances]:
        image_HWC, objects = source.sample(index)
        return resized_to_test(config, image_HWC), objects

    for shown in samples_to_test(job, read):
        images = [image_CHW.to(job.here.device, non_blocking=True) / 255 for image_CHW, _ in shown]
        sizes = [objects.masks_NHW.shape[1:] for _, objects in shown]
        for found, (_, objects) in zip(detect(model, images, sizes), shown):
            yield found | {"masks": found["masks"][:, 0] > _SURE}, objects
