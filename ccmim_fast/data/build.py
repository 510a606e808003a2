"""From the configuration to the images: which source, which loader."""

from collections.abc import Iterator
from typing import Protocol

import torch

from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.index.bad_samples import Skipped
from ccmim_fast.data.index.indexed import IndexedSource, open_images
from ccmim_fast.data.made.photos import PhotosSource
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.source import Source
from ccmim_fast.data.stream import dali_loader
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.data.stream.torch_loader import TorchLoader
from ccmim_fast.errors import ConfigError


class Loader(Protocol):
    """Training micro-batches of one rank.

    Attributes:
        plan: what comes, and in which order.
        skipped: what could not be shown so far.
    """

    plan: Plan
    skipped: Skipped

    def stream(self, cursor: int) -> Iterator[Batch]:
        """`train.accumulate` batches, one after the other, for each optimizer step, without end.

        What comes depends on the seed and the place in the stream alone. For an image that cannot be shown comes a
        substitute (`data.stream.fallback`). A batch is to be used before the next step's second one is asked for; on
        a GPU its memory is used again then.

        Args:
            cursor: samples seen before, by all ranks.

        Raises:
            DataError: too many images cannot be shown, see `Skipped`.
        """
        ...


def build_source(data: DataConfig, seed: int) -> Source:
    """The images that `data.source` names.

    Raises:
        DataError: no readable image.
        ConfigError: made images of other than 3 channels, too small, or of a number of classes that is not made.
    """
    if data.source == "images":
        return open_images(data.root, data.channels, data.index, quiet=False)
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
    shards: int = 1,
) -> Loader:
    """The training loader that `data.build` names; `auto` is DALI for files where it is installed, else torch.

    Args:
        global_batch: images per optimizer step, over all ranks and micro-batches.
        accumulate: micro-batches per optimizer step.
        rank, world_size: this process among those that train together.
        device: where the batches go.
        shards: parts of the samples, each on ranks of its own; see `Plan`.

    Raises:
        ConfigError: the batch or the ranks cannot be divided, or the loader cannot read such images.
        DataError: fewer images than `global_batch`, or too many that cannot be used.
        MachineError: `loader: dali` without DALI.
    """
    plan = Plan(
        source,
        seed,
        global_batch,
        accumulate,
        rank,
        world_size,
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        flip=data.flip,
        window=data.window,
        shards=shards,
    )
    index = source.index if isinstance(source, IndexedSource) else None
    skipped = Skipped(index, len(source), len(source.excluded_X), data.on_error, data.max_bad)
    suits_dali = isinstance(source, IndexedSource) and source.channels in (1, 3)
    use_dali = data.loader == "dali" or (data.loader == "auto" and suits_dali and dali_loader.is_installed())
    kind = dali_loader.DaliLoader if use_dali else TorchLoader
    return kind(plan, skipped, data.image_size, data.workers, torch.device(device))
