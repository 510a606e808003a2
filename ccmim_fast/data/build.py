"""This module builds the image source and the loader that the settings name."""

from collections.abc import Iterator

import torch

from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.source import Source
from ccmim_fast.data.stream.batch import Batch, Buffers
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.data.threads import thread_count
from ccmim_fast.errors import ConfigError
from ccmim_fast.registry import IMAGE_SOURCES, LOADERS, load


class Loader:
    """A loader yields the training micro-batches of one rank.

    `plan` says which samples this rank loads, in which order, with which crops of `image_size`, height and width in
    pixels. `workers` are threads; 0: this rank's share of the cores. The batches go to `device`. Raises ConfigError if
    the loader cannot read such images, MachineError if a library is missing.
    """

    def __init__(
        self, plan: Plan, bad_samples: BadSamples, image_size: tuple[int, int], workers: int, device: torch.device
    ):
        self.plan, self.bad_samples, self._image_size = plan, bad_samples, image_size
        self._threads, self._device = thread_count(workers), device

    @staticmethod
    def suits(source: Source) -> bool:
        """Tell whether the loader is installed and gains from such images; `data.loader=auto` asks."""
        return True

    def stream(self, cursor: int) -> Iterator[Batch]:
        """Yield `train.accumulate` batches for each optimizer step, without end, from sample number `cursor` on.

        The batches depend on the seed and the position in the stream alone. A sample that fails is replaced by its
        fallback. A batch must be used before the second batch of the next step is asked for: on a GPU its memory is
        used again then. Raises DataError if too many samples fail, see `BadSamples`.
        """
        raise NotImplementedError

    def buffers(self) -> Buffers:
        """Return the memory of the images that `stream` yields."""
        shape = (self.plan.micro_batch_size, *self._image_size, self.plan.source.channels)
        dtype = getattr(torch, str(self.plan.source.dtype))
        return Buffers(shape, dtype, self._device, held=self.plan.accumulate)


def build_source(data: DataConfig, seed: int) -> Source:
    """Open the images that `data.source` names.

    Raises DataError if no image is readable, ConfigError for settings that generated images cannot have.
    """
    kind = IMAGE_SOURCES[data.source]
    if kind.channels not in (0, data.channels):
        raise ConfigError(f"data.channels={data.channels} must be {kind.channels} for data.source={data.source}")
    return load(kind.path)(data, seed)


def suitable_loaders(source: Source) -> dict[str, type[Loader]]:
    """Return the loaders that are installed and gain from such images, by name."""
    return {name: loader for name, path in LOADERS.items() if (loader := load(path)).suits(source)}


def build_loader(
    source: Source, data: DataConfig, seed: int, global_batch: int, device: str | torch.device = "cpu", **division: int
) -> Loader:
    """Build the training loader that `data.loader` names; `auto` is DALI for files where it is installed, else torch.

    `division` is accumulate, rank, world_size and partitions, see `Plan`. Raises the errors of `Plan`, of `BadSamples`
    and of the loader.
    """
    own = {name: getattr(data, name) for name in ("crop_scale", "crop_ratio", "crop_rule", "flip", "window")}
    plan = Plan(source, seed, global_batch, **own, **division)
    bad_samples = BadSamples(source, data.on_error, data.max_bad)
    name = next(iter(suitable_loaders(source))) if data.loader == "auto" else data.loader
    return load(LOADERS[name])(plan, bad_samples, data.image_size, data.workers, torch.device(device))
