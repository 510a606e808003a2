"""From the configuration to the images: which source, which loader."""

from collections.abc import Iterator
from typing import Protocol

import torch

from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data import dali_loader
from ccmim_fast.data.batch import Batch
from ccmim_fast.data.index import FolderSource, scan_folder
from ccmim_fast.data.photos import PhotosSource
from ccmim_fast.data.plan import Plan
from ccmim_fast.data.shapes import ShapesSource
from ccmim_fast.data.source import Source
from ccmim_fast.data.torch_loader import TorchLoader
from ccmim_fast.errors import ConfigError


class Loader(Protocol):
    """Training micro-batches of one rank.

    Attributes:
        steps_per_epoch: optimizer steps in an epoch.
    """

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """`train.accumulate` batches, one after the other, for each optimizer step from `start_step` on.

        What comes depends on the seed, the epoch and the step alone. Raises DataError naming a file that does not
        decode.
        """
        ...


def build_source(data: DataConfig, seed: int) -> Source:
    """The images that `data.source` names.

    Raises:
        DataError: no readable image.
        ConfigError: made images of other than 3 channels, too small, or of a number of classes that is not made.
    """
    if data.source == "folder":
        return scan_folder(data.root, data.channels)
    if data.channels != 3:
        raise ConfigError(f"data.channels={data.channels} must be 3 for data.source={data.source}")
    if data.source == "photos":
        return PhotosSource(seed, data.samples, data.image_size, data.root or None)
    return ShapesSource(seed, data.samples, data.image_size, data.classes, data.background, data.root or None)


def build_loader(
    source: Source,
    data: DataConfig,
    seed: int,
    global_batch: int,
    accumulate: int = 1,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
) -> Loader:
    """The training loader that `data.loader` names; `auto` is DALI for files where it is installed, else torch.

    Args:
        global_batch: images per optimizer step, over all ranks and micro-batches.
        accumulate: micro-batches per optimizer step.
        rank, world_size: this process among those that train together.
        device: where the batches go.

    Raises:
        ConfigError: the batch cannot be divided, or the loader cannot read such images.
        DataError: fewer images than `global_batch`.
        MachineError: `loader: dali` without DALI.
    """
    plan = Plan(
        source.sizes_N2,
        seed,
        global_batch,
        accumulate,
        rank,
        world_size,
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        flip=data.flip,
    )
    suits_dali = isinstance(source, FolderSource) and source.channels in (1, 3)
    use_dali = data.loader == "dali" or (data.loader == "auto" and suits_dali and dali_loader.is_installed())
    kind = dali_loader.DaliLoader if use_dali else TorchLoader
    return kind(source, plan, data.image_size, data.workers, torch.device(device))
