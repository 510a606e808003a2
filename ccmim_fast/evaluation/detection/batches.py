"""Images with their objects become what the detector takes: augmented to train on, resized to test on."""

# N objects, C channels, H height, W width

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.evaluation.detection.instances import Instances
from ccmim_fast.evaluation.job import Job
from ccmim_fast.evaluation.loader import SampleLoader
from ccmim_fast.evaluation.supervised import seed_generators

# An image, uint8 [C, H, W], and torchvision's target: boxes, labels from 1 on, masks.
Sample = tuple[Tensor, dict[str, Tensor]]


class ForTraining:
    """Resize, crop, mirror. Objects of which nothing is left, and crowds, are left out; there may be none at all.

    `short_side`: the shorter side is one of `detect.short_sides`, the longer one `detect.long_side` at most (as for
    ResNets since Detectron). `jitter`: the image is fitted into `data.image_size` times a share of `detect.jitter`,
    then cropped or padded with `mean` (0 .. 1 per channel) to it (large-scale jitter; Ghiasi et al., 2021); boxes are
    drawn anew around what is left.
    """

    def __init__(self, config: EvalConfig, mean: tuple[float, ...]):
        detect, size = config.detect, config.data.image_size
        self._redraw = detect.resize == "jitter"
        if self._redraw:
            fill = {tv_tensors.Image: [255 * value for value in mean], "others": 0}
            steps = [
                v2.ScaleJitter(size, scale_range=detect.jitter),
                v2.RandomCrop(size, pad_if_needed=True, fill=fill),
            ]
        else:
            steps = [v2.RandomShortestSize(list(detect.short_sides), max_size=detect.long_side)]
        if config.data.flip:
            steps.append(v2.RandomHorizontalFlip())
        self._steps = v2.Compose([*steps, v2.ClampBoundingBoxes()])

    def __call__(self, image_HWC: np.ndarray, objects: Instances) -> Sample:
        one = ~objects.crowd_N
        size = image_HWC.shape[:2]
        image, boxes, masks = self._steps(
            tv_tensors.Image(torch.from_numpy(np.array(image_HWC)).permute(2, 0, 1)),
            tv_tensors.BoundingBoxes(torch.from_numpy(objects.boxes_N4[one]), format="XYXY", canvas_size=size),
            tv_tensors.Mask(torch.from_numpy(objects.masks_NHW[one])),
        )
        image_CHW, boxes_N4, masks_NHW = (part.as_subclass(Tensor) for part in (image, boxes, masks))
        labels_N = torch.from_numpy(objects.labels_N[one]) + 1
        if self._redraw:
            shown_N = masks_NHW.flatten(1).any(1)
            boxes_N4[shown_N] = masks_to_boxes(masks_NHW[shown_N]) + boxes_N4.new_tensor([0, 0, 1, 1])
        else:
            shown_N = (boxes_N4[:, 2:] > boxes_N4[:, :2]).all(1)
        target = {"boxes": boxes_N4[shown_N], "labels": labels_N[shown_N], "masks": masks_NHW[shown_N].byte()}
        return image_CHW.contiguous(), target


def resized_to_test(config: EvalConfig, image_HWC: np.ndarray) -> Tensor:
    """Resize an image, uint8 [H, W, C] -> [C, H, W]: the shorter side to the last of `detect.short_sides`; with
    `jitter`, to fit into `data.image_size`."""
    detect = config.detect
    if detect.resize == "jitter":
        resize = v2.ScaleJitter(config.data.image_size, scale_range=(1.0, 1.0))
    else:
        resize = v2.RandomShortestSize(detect.short_sides[-1], max_size=detect.long_side)
    return resize(torch.from_numpy(np.array(image_HWC)).permute(2, 0, 1)).contiguous()


Targets = list[dict[str, Tensor]]  # of each image, see `Sample`


class ObjectLoader(SampleLoader):
    """This loader gives training batches of one rank: images [C, H, W] in 0..1, of any sizes, and their targets."""

    def __init__(self, job: Job):
        super().__init__(job)
        self._transform = ForTraining(job.config, job.weights.mean)

    def read(self, index: int) -> tuple[np.ndarray, Instances]:
        return self.plan.source.sample(index)

    def make(self, read: tuple[np.ndarray, Instances], index: int, epoch: int) -> Sample:
        seed_generators(self.config.seed, epoch, index)  # torchvision's transforms draw from torch's
        return self._transform(*read)

    collate = staticmethod(list)  # of images of any sizes

    def place(self, batch: list[Sample], number: int) -> tuple[list[Tensor], Targets]:
        """See `SampleLoader`; images become shares of 1."""
        device = self.here.device
        images = [image_CHW.to(device, non_blocking=True) / 255 for image_CHW, _ in batch]
        return images, [{k: v.to(device, non_blocking=True) for k, v in target.items()} for _, target in batch]
