"""An evaluation trains on some labelled images and tests on others."""

from pathlib import Path
from typing import NamedTuple

from ccmim_fast.config.evaluation import EvalConfig, images_of
from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.build import build_source
from ccmim_fast.data.index.annotations import flowers_origins, inaturalist_origins
from ccmim_fast.data.source import Source, usable_count
from ccmim_fast.errors import ConfigError, DataError


class Images(NamedTuple):
    """This tuple holds one of the two sets, and what its loaders are built from."""

    source: Source
    data: DataConfig

    @property
    def classes(self) -> int:
        return len(self.source.class_names)

    def words(self) -> str:
        return f"{usable_count(self.source)} images of {self.classes} classes"


def open_both(config: EvalConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Images, Images]:
    """Open the training images and the test images.

    Raises:
        DataError: no readable image, no labels, or other classes in one set than in the other.
        ConfigError: nobody says where the test images are.
    """
    data = config.data
    mean, std = data.mean or mean, data.std or std
    if len(mean) != len(std):
        raise ConfigError(f"data.std={list(std)}: must be of {len(mean)} values, as data.mean")
    roots = _ROOTS[data.source](data.root, data.test)
    both = []
    for test, root in enumerate(roots):
        of_these = images_of(data, mean, std, test=bool(test))
        # But for shapes, what is named is files, by one way or another.
        values = {**vars(of_these), "root": root, "source": "shapes" if data.source == "shapes" else "images"}
        source = build_source(DataConfig(**values), config.seed + test)
        if source.labels_N is None:
            raise DataError(f"{root}: its images have no labels; put those of each class into a folder of its own")
        both.append(Images(source, DataConfig(**values)))
    train, test = both
    if train.source.class_names != test.source.class_names:
        other = sorted(set(train.source.class_names) ^ set(test.source.class_names))
        raise DataError(f"{roots[1]}: not the classes of {roots[0]}; {other[0]!r:.80} is in one of them alone")
    return train, test


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
