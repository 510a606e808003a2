"""A job is what an evaluation works on: an encoder, labelled images to train on, and others to test on."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ccmim_fast.checkpoints.published import Weights
from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.build import build_source
from ccmim_fast.data.index.annotations import flowers_origins, inaturalist_origins
from ccmim_fast.data.source import Source, usable_count
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.data.stream.torch_loader import evaluation_batches
from ccmim_fast.errors import ConfigError, DataError
from ccmim_fast.evaluation.encoders import Encoder, build_encoder
from ccmim_fast.ranks.session import Session
from ccmim_fast.runs.folder import RunFolder


class Images(NamedTuple):
    """This tuple holds one of the two sets, and what its loaders are built from."""

    source: Source
    data: DataConfig

    @property
    def classes(self) -> int:
        return len(self.source.class_names)

    def words(self) -> str:
        return f"{usable_count(self.source)} images of {self.classes} classes"


def open_both(config: EvalConfig, *data: DataConfig) -> list[Source]:
    """Open the training images and the test images.

    Raises DataError: no readable image, no labels, or classes differ; ConfigError: nobody says where test images are.
    """
    mean, std = data[0].mean, data[0].std
    if len(mean) != len(std):
        raise ConfigError(f"data.std={list(std)}: must be of {len(mean)} values, as data.mean")
    roots = _ROOTS[config.data.source](config.data.root, config.data.test)
    # But for shapes, what is named is files, by one way or another.
    kind = "shapes" if config.data.source == "shapes" else "images"
    sources = []
    for root, of_these in zip(roots, data):
        sources.append(build_source(replace(of_these, root=root, source=kind), config.seed + len(sources)))
        if sources[-1].labels_N is None:
            raise DataError(f"{root}: its images have no labels; put those of each class into a folder of its own")
    names, others = (source.class_names for source in sources)
    if names != others:
        differ = set(names) ^ set(others)
        how = f"{min(differ)!r:.80} is in one of them alone" if differ else "they are in another order"
        raise DataError(f"{roots[1]}: not the classes of {roots[0]}; {how}")
    return sources


def _folders(root: str, test: str) -> tuple[str, str]:
    train = Path(root) / "train"
    if test:
        return (str(train) if root and train.is_dir() else root), test
    for name in ("val", "test"):
        if root and train.is_dir() and (Path(root) / name).is_dir():
            return str(train), str(Path(root) / name)
    raise ConfigError(f"data.test='': no train/ beside val/ or test/ in data.root={root!r:.100}; say where they are")


# (data.root, data.test) -> where the images to train on and to test on are
_ROOTS = {
    "images": _folders,
    "shapes": lambda root, _: (root, root),
    "inaturalist": inaturalist_origins,
    "flowers": flowers_origins,
}


class Job(NamedTuple):
    """This tuple holds an encoder's weights, images to train on and to test on, and where to write."""

    config: EvalConfig
    here: Session
    folder: RunFolder
    weights: Weights
    train: Images
    test: Images

    def build_encoder(self, **options: Any) -> nn.Module:
        """Build timm's module for the settings' images, on the CPU; for the options see `encoders.build_encoder`."""
        return build_encoder(self.weights, self.config.data.image_size, self.config.model.num_heads, **options)

    def frozen_encoder(self, pool: str = "avg") -> Encoder:
        """Return the encoder, on the device, without gradient. Raises ConfigError if it has no [CLS] for `pool`."""
        encoder = Encoder(self.build_encoder(), self.weights.mean, self.weights.std).to(self.here.device)
        if pool == "cls" and not encoder.prefix:
            raise ConfigError(f"model.pool=cls: {self.weights.arch} has no [CLS] token; nearest valid is avg")
        return encoder.eval().requires_grad_(False)

    def batches(self, images: Images, size: int) -> Iterator[Batch]:
        """Yield this rank's share, every `world_size`-th image once, `size` at a time, without augmentation."""
        data, here = self.config.data, self.here
        shown = images.source, data.image_size, size, here.device, data.workers
        return evaluation_batches(*shown, central=data.test_crop, part=(here.rank, here.world_size))
