"""The registries of image sources (`data.source`) and of loaders (`data.loader`), and what builds one of each."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.made.photos import PhotosSource
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.source import Source
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.data.stream.dali_loader import DaliLoader
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.data.stream.torch_loader import TorchLoader
from ccmim_fast.errors import ConfigError


class Loader(Protocol):
    """Training micro-batches of one rank.

    Args:
        plan: which samples this rank loads, in which order, with which crops.
        bad_samples: the account of samples that fail.
        image_size: height and width of the crops, pixels.
        workers: threads; 0: this rank's share of the cores.
        device: where the batches go.

    Raises:
        ConfigError: the loader cannot read such images.
        MachineError: a library that the loader needs is missing.
    """

    plan: Plan
    bad_samples: BadSamples

    def __init__(
        self, plan: Plan, bad_samples: BadSamples, image_size: tuple[int, int], workers: int, device: torch.device
    ): ...

    @staticmethod
    def suits(source: Source) -> bool:
        """Tell whether the loader is installed and gains from such images; `data.loader=auto` asks."""
        ...

    def stream(self, cursor: int) -> Iterator[Batch]:
        """Yield `train.accumulate` batches for each optimizer step, without end.

        The batches depend on the seed and the position in the stream alone. A sample that fails is replaced by its
        fallback (`data.stream.prefetch`). A batch must be used before the second batch of the next step is asked
        for: on a GPU its memory is used again then.

        Args:
            cursor: number of samples that all ranks have seen before.

        Raises:
            DataError: too many samples fail, see `BadSamples`.
        """
        ...


# data.loader -> class. `auto` takes the last one that suits the source.
LOADERS: dict[str, type[Loader]] = {"torch": TorchLoader, "dali": DaliLoader}

# data.source -> function of the settings and the seed
SOURCES: dict[str, Callable[[DataConfig, int], Source]] = {
    "images": lambda data, seed: open_images(data.root, data.channels, data.index, quiet=False),
    "photos": lambda data, seed: PhotosSource(seed, data.samples, data.image_size, data.root or None),
    "shapes": lambda data, seed: ShapesSource(
        seed, data.samples, data.image_size, data.classes, data.background, data.root or None
    ),
}


def build_source(data: DataConfig, seed: int) -> Source:
    """Open the images that `data.source` names.

    Raises:
        DataError: there is no readable image.
        ConfigError: generated images cannot have these channels, this size or this number of classes.
    """
    if data.source != "images" and data.channels != 3:
        raise ConfigError(f"data.channels={data.channels} must be 3 for data.source={data.source}")
    return SOURCES[data.source](data, seed)


def build_loader(
    source: Source,
    data: DataConfig,
    seed: int,
    global_batch: int,
    accumulate: int = 1,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    partitions: int = 1,
) -> Loader:
    """Build the training loader that `data.loader` names; `auto` is DALI for files where it is installed, else torch.

    Args:
        global_batch: images per optimizer step, over all ranks and micro-batches.
        accumulate: micro-batches per optimizer step.
        rank, world_size: this process among the processes that train together.
        device: where the batches go.
        partitions: parts of the samples, each on its own ranks; see `Plan`.

    Raises:
        ConfigError: the batch or the ranks cannot be divided, or the loader cannot read such images.
        DataError: there are fewer images than `global_batch`, or too many bad samples.
        MachineError: a library that the loader needs is missing.
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
        partitions=partitions,
    )
    bad_samples = BadSamples.of(source, data.on_error, data.max_bad)
    name = data.loader
    if name == "auto":
        name = [name for name, loader in LOADERS.items() if loader.suits(source)][-1]
    return LOADERS[name](plan, bad_samples, data.image_size, data.workers, torch.device(device))
