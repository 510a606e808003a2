"""The images of an evaluation: two labelled sets, what is left out of them, and the classes, which are training's."""

# N samples, C classes, X samples that are left out

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.build import build_source
from ccmim_fast.data.index.annotations import flowers_origins, inaturalist_origins
from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.index.decode import BYTE
from ccmim_fast.data.progress import progress_bar
from ccmim_fast.data.source import Source, usable_count, usable_ids, without
from ccmim_fast.data.stream.prefetch import attempted
from ccmim_fast.data.threads import map_ahead, thread_count
from ccmim_fast.errors import ConfigError, DataError, say
from ccmim_fast.ranks.session import Session, gather_values

_AHEAD = 2  # images that each thread has read ahead


@dataclass
class Images:
    """This class holds one of the two sets, and what its loaders are built from."""

    source: Source
    data: DataConfig
    bad: BadSamples = field(init=False)  # records those that fail while they are shown; of this rank

    def __post_init__(self):
        self.bad = BadSamples(self.source, self.data.on_error, self.data.max_bad)

    @property
    def classes(self) -> int:
        return len(self.source.class_names)

    def words(self) -> str:
        return f"{usable_count(self.source)} images of {self.classes} classes"

    def left_out(self) -> dict[str, dict[str, Any]]:
        """Return how many are left out and the name of the first one, by the reason; all ranks must ask."""
        ids_of = dict(getattr(self.source, "left_out", {}))
        failed = self._failed()
        index = getattr(self.source, "index", None)
        if index is not None:
            ids_of["that cannot be used"] = index.excluded_X
        ids_of["that failed while they were shown"] = np.array(sorted(failed), dtype=np.int64)
        return {
            why: {"images": len(ids_X), "of": len(self.source), "first": self.source.name(int(ids_X[0]))}
            for why, ids_X in ids_of.items()
            if len(ids_X)
        }

    def look_through_(self, here: Session) -> None:
        """Read each image once, ahead of the hours, and leave out those that cannot be read; on all ranks the same.

        Of those that fail later any share is left out. Raises DataError: see `BadSamples`, or no image is left.
        """
        read, threads = getattr(self.source, "sample", self.source.decode), thread_count(self.data.workers)
        ids = usable_ids(self.source, np.arange(here.rank, usable_count(self.source), here.world_size)).tolist()

        def look(index: int) -> None:
            attempted(read, index, index, self.bad)

        with progress_bar("reading the images to test on", quiet=not here.is_main) as report:
            for count, _ in enumerate(map_ahead(look, ids, threads, _AHEAD * threads), 1):
                report(count, len(ids))
        reasons = self._failed()
        self.source = without(self.source, np.array(sorted(reasons), dtype=np.int64), "that cannot be read")
        if not usable_count(self.source):
            raise DataError(f"none of the images to test on can be read, the last {reasons.popitem()[1]}")
        self.bad = BadSamples(self.source, "skip", max_bad=1.0)

    def _failed(self) -> dict[int, str]:
        """Return the reasons of all ranks by sample id."""
        return {index: reason for of_rank in gather_values(self.bad.reasons) for index, reason in of_rank.items()}


def round_pixels_(both: Sequence[Images], here: Session) -> None:
    """Have both sets give pixels of 8 bits, on which augmentation works; say so where there are more."""
    if here.is_main and any(images.source.dtype != BYTE for images in both):
        say("pixels are rounded to 8 bits, on which the augmentation of this evaluation works")
    for images in both:
        images.source.dtype = BYTE


def open_both(config: EvalConfig, *data: DataConfig) -> list[Source]:
    """Open the training images and the test images; both have the classes that are trained on, see `with_classes`.

    Raises DataError: no readable image, no labels; ConfigError: nobody says where test images are.
    """
    mean, std = data[0].mean, data[0].std
    if len(mean) != len(std):
        raise ConfigError(f"data.std={list(std)}: must be of {len(mean)} values, as data.mean")
    roots = _ROOTS[config.data.source](config.data.root, config.data.test)
    # But for shapes, what is named is files, by one way or another.
    kind = "shapes" if config.data.source == "shapes" else "images"
    sources = []
    for root, of_these in zip(roots, data):
        sources.append(build_source(replace(of_these, root=root, source=kind), (config.seed + len(sources)) % 2**32))
    return with_classes(*sources, roots)


def with_classes(train: Source, test: Source, roots: Sequence[str]) -> list[Source]:
    """Return both sets with the classes that usable training images have, whose order is that of the training set.

    A class is known by its name, whatever its number in the test set. Left out are images without a label, whose label
    is no class's number or below 0, and images to test on of a class that training does not know. `roots` name the sets
    for messages. Raises DataError: no labels, training images of one class, or no image to test on of a known one.
    """
    for root, source in zip(roots, (train, test)):
        if source.labels_N is None:
            raise DataError(f"{root}: its images have no labels; put those of each class into a folder of its own")
    seen = np.setdiff1d(np.arange(len(train)), train.excluded_X)
    counts = np.bincount(train.labels_N[seen].clip(-1) + 1, minlength=len(train.class_names) + 1)[1:]
    names = tuple(name for name, count in zip(train.class_names, counts) if count)
    if len(names) < 2:
        what = f"of one class alone, {names[0]!r:.80}" if names else "without any label"
        raise DataError(
            f"{roots[0]}: its {len(seen)} images are {what}; an evaluation tells two classes apart at least"
        )
    both = [_with_classes(source, names) for source in (train, test)]
    if not usable_count(both[1]):
        raise DataError(
            f"{roots[1]}: none of its {len(test)} images is usable and of a class of {roots[0]}; "
            f"its own classes: {_some(test.class_names)}; those trained on: {_some(names)}"
        )
    return both


def _with_classes(source: Source, names: tuple[str, ...]) -> Source:
    label_of = {name: label for label, name in enumerate(names)}
    own = source.class_names
    # One more for what has no class.
    new_C = np.array([*(label_of.get(name, -1) for name in own), -1])
    given_N = np.asarray(source.labels_N, dtype=np.int64)
    given_N = np.where((given_N >= 0) & (given_N < len(own)), given_N, len(own))
    labels_N, usable_N = new_C[given_N], np.ones(len(source), dtype=bool)
    usable_N[source.excluded_X] = False
    unlabelled_X = np.flatnonzero(usable_N & (given_N == len(own)))
    unknown_X = np.flatnonzero(usable_N & (given_N < len(own)) & (labels_N < 0))
    if own != names:
        source = copy.copy(source)
        source.labels_N, source.class_names = labels_N, names
    unknown = sorted({own[label] for label in np.unique(given_N[unknown_X])})
    source = without(source, unlabelled_X, "without a label")
    return without(source, unknown_X, f"of {len(unknown)} classes that training does not know ({_some(unknown)})")


def _some(names: Sequence[str]) -> str:
    return ", ".join(f"{name!r:.40}" for name in names[:3]) + (", ..." if len(names) > 3 else "")


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
