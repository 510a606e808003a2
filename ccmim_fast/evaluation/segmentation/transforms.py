"""Images change with their labels: resized, cropped, mirrored, distorted, padded (mmsegmentation's for ADE20K)."""

# H height, W width, C channels; images [C, H, W] uint8

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Image, Mask

from ccmim_fast.evaluation.job import Job
from ccmim_fast.evaluation.loader import SampleLoader
from ccmim_fast.evaluation.segmentation.scenes import IGNORED

# Half-widths and ranges of the distortion, each with a probability of a half; mmsegmentation.
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32, (0.5, 1.5), (0.5, 1.5), 18 / 180
_TRIES = 11  # crops drawn until one is varied enough; the last is taken as it is


class Pair(NamedTuple):
    """This tuple holds an image, uint8, and labels, uint8, `IGNORED` where there is no class."""

    image_CHW: Image
    labels_HW: Mask

    @property
    def size(self) -> tuple[int, int]:
        """Return H, W."""
        return tuple(self.labels_HW.shape)

    def resized(self, size: tuple[int, int]) -> "Pair":
        """Resize bilinearly without antialiasing, labels by the nearest, both as cv2 does."""
        options = {"interpolation": InterpolationMode.BILINEAR, "antialias": False}
        return Pair(*(F.resize(one, list(size), **options) for one in self))


def pair_of(image_HWC: np.ndarray, labels_HW: np.ndarray) -> Pair:
    """Join a decoded image and its labels."""
    image_CHW = torch.from_numpy(np.array(image_HWC)).permute(2, 0, 1).contiguous()
    return Pair(Image(image_CHW), Mask(torch.from_numpy(np.array(labels_HW))))


@dataclass(frozen=True)
class Augment:
    """Make a pair ready to be trained on: [C, *size] and [*size]; all draws are the generator's."""

    size: tuple[int, int]  # height, width of the crop, pixels
    sides: tuple[int, int]  # short and long side, see `scaled`
    ratio: tuple[float, float]  # times `sides`
    most: float  # share of a crop's labelled pixels that one class may have
    flip: bool  # mirror left to right, p = 0.5
    colour: tuple[int, ...]  # of what is padded, 0 .. 255

    def __call__(self, pair: Pair, draws: np.random.Generator) -> Pair:
        ratio = draws.uniform(*self.ratio)
        short, long = (int(side * ratio) for side in self.sides)
        pair = pair.resized(scaled(pair.size, (short, long)))
        pair = self._crop(pair, draws)
        if self.flip and draws.random() < 0.5:
            pair = Pair(*map(F.horizontal_flip, pair))
        image_CHW = distort(pair.image_CHW, draws)
        # Below and to the right, by one colour that is ignored.
        below, beside = (max(0, asked - has) for asked, has in zip(self.size, pair.size))
        sides = [0, 0, beside, below]
        return Pair(F.pad(image_CHW, sides, fill=list(self.colour)), F.pad(pair.labels_HW, sides, fill=IGNORED))

    def _crop(self, pair: Pair, draws: np.random.Generator) -> Pair:
        room = [max(0, has - asked) for has, asked in zip(pair.size, self.size)]
        for _ in range(_TRIES):
            y, x = (int(draws.integers(most + 1)) for most in room)
            crop = Pair(*(F.crop(one, y, x, *map(min, pair.size, self.size)) for one in pair))
            counts = torch.bincount(crop.labels_HW.flatten(), minlength=IGNORED)[:IGNORED]
            if 0 < counts.max() <= self.most * counts.sum():
                break
        return crop


def scaled(size: tuple[int, int], sides: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of an image made as large as fits into sides (short, long), its aspect kept."""
    factor = min(side / of_image for side, of_image in zip(sides, sorted(size)))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def distort(image_CHW: Tensor, draws: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue, each in half of the cases; contrast first or last of the last 3.

    Saturation and hue are those of HSV.
    """

    def with_contrast(pixels_CHW: Tensor) -> Tensor:
        return (pixels_CHW * draws.uniform(*_CONTRAST)).clamp(0, 255) if draws.random() < 0.5 else pixels_CHW

    pixels_CHW = image_CHW.as_subclass(Tensor).float()
    if draws.random() < 0.5:
        pixels_CHW = (pixels_CHW + draws.uniform(-_BRIGHTNESS, _BRIGHTNESS)).clamp(0, 255)
    contrast_last = draws.random() < 0.5
    if not contrast_last:
        pixels_CHW = with_contrast(pixels_CHW)
    if draws.random() < 0.5:
        pixels_CHW = saturated(pixels_CHW, draws.uniform(*_SATURATION))
    if draws.random() < 0.5:
        pixels_CHW = 255 * F.adjust_hue(pixels_CHW / 255, draws.uniform(-_HUE, _HUE))
    if contrast_last:
        pixels_CHW = with_contrast(pixels_CHW)
    return Image(pixels_CHW.round().clamp(0, 255).to(torch.uint8))


def saturated(pixels_CHW: Tensor, factor: float) -> Tensor:
    """Multiply HSV's saturation by `factor`, to 1 at most: each channel's distance below the largest, the value."""
    value_1HW = pixels_CHW.amax(0, keepdim=True)
    below_CHW = value_1HW - pixels_CHW
    largest_1HW = below_CHW.amax(0, keepdim=True).clamp(min=1e-6)
    return value_1HW - below_CHW * (value_1HW / largest_1HW).clamp(max=factor)


class SceneBatch(NamedTuple):
    """images_BCHW: uint8. labels_BHW: uint8, `IGNORED` where there is no class."""

    images_BCHW: Tensor
    labels_BHW: Tensor


class SceneLoader(SampleLoader):
    """This loader gives training micro-batches of one rank."""

    def __init__(self, job: Job):
        super().__init__(job)
        segment, data = job.config.segment, job.config.data
        colour = tuple(round(255 * value) for value in job.weights.mean)
        self._augment = Augment(data.image_size, segment.sides, segment.ratio, segment.most, data.flip, colour)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.plan.source.sample(index)

    def make(self, read: tuple[np.ndarray, np.ndarray], index: int, epoch: int) -> Pair:
        draws = np.random.default_rng((self.config.seed, epoch, index))
        return self._augment(pair_of(*read), draws)

    def collate(self, samples: list[Pair]) -> SceneBatch:
        return SceneBatch(*map(torch.stack, zip(*samples)))
