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

    Raises ConfigError if the loader cannot read such images, MachineError if a library is missing.
    """

    plan: Plan
    bad_samples: BadSamples

    def __init__(
        self, plan: Plan, bad_samples: BadSamples, image_size: tuple[int, int], workers: int, device: torch.device
    ): ...

    @staticmethod
    def suits(source: Source) -> bool:
        """Tell whether the loader is installed and gains from such images; `data.loader=auto` asks."""

    def stream(self, cursor: int) -> Iterator[Batch]:
        """Yield `train.accumulate` batches for each optimizer step, without end, from sample number `cursor` on.

        The batches depend on the seed and the position in the stream alone. A sample that fails is replaced by its
        fallback. A batch must be used before the second batch of the next step is asked for: on a GPU its memory is
        used again then. Raises DataError if too many samples fail, see `BadSamples`.
        """


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

    Raises DataError if no image is readable, ConfigError for settings that generated images cannot have.
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
        global_batch, accumulate, rank, world_size, partitions: see `Plan`.
        device: where the batches go.

    Raises the errors of `Plan`, of `BadSamples` and of the loader.
    """
    own = {name: getattr(data, name) for name in ("crop_scale", "crop_ratio", "flip", "window")}
    plan = Plan(source, seed, global_batch, accumulate, rank, world_size, partitions=partitions, **own)
    bad_samples = BadSamples.of(source, data.on_error, data.max_bad)
    name = data.loader
    if name == "auto":
        name = [name for name, loader in LOADERS.items() if loader.suits(source)][-1]
    return LOADERS[name](plan, bad_samples, data.image_size, data.workers, torch.device(device))
