"""Images with a label for each pixel: folders as ADE20K's owners publish them, or shapes made by code."""

# N scenes, H height, W width

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.index.formats import open_picture
from ccmim_fast.data.index.indexed import IndexedSource, open_images
from ccmim_fast.data.made.shapes import build
from ccmim_fast.data.source import Source, UnreadableError
from ccmim_fast.data.threads import thread_count
from ccmim_fast.errors import DataError, one_line

IGNORED = 255  # label of pixels that count neither in the loss nor in the figures
PARTS = ("training", "validation")  # ADE20K's names of the images to train on and to test on
NAMES = "objectInfo150.txt"  # below a heading a line a class, tab-separated: its number first, its name last
_MODES = ("L", "P", "I;16", "I", "1")  # Pillow's names of gray of 8, 16 and 1 bit, and of a palette


class Scenes:
    """Images of a source, of 3 channels, with labels of their pixels; as much of a `Source` as plans ask for.

    `labels` gives those of an id, [H, W] uint8, 0 .. K - 1 or `IGNORED`, of K `class_names`, at most 255; `sample` the
    pixels, too. Both raise DataError naming the file.
    """

    channels = 3

    def __init__(self, images: Source, class_names: tuple[str, ...], labels: Callable[[int], np.ndarray]):
        self.class_names, self.labels = class_names, labels
        self.sizes_N2, self.excluded_X = images.sizes_N2, images.excluded_X
        self.name, self.decode, self.fingerprint = images.name, images.decode, images.fingerprint
        # Images that cannot be decoded are put down there; made ones have none.
        self.index = getattr(images, "index", None)
        self._images = images

    @property
    def dtype(self) -> np.dtype:
        """Return the type of the pixels; it can be set."""
        return self._images.dtype

    @dtype.setter
    def dtype(self, dtype: np.dtype) -> None:
        self._images.dtype = dtype

    def __len__(self) -> int:
        return len(self.sizes_N2)

    def has_class(self, index: int) -> bool:
        """Tell whether any pixel counts; not so where the labels cannot be read."""
        with contextlib.suppress(DataError):
            return bool((self.labels(index) != IGNORED).any())
        return False

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image_HWC = self.decode(index)
        try:
            return image_HWC, self.labels(index)
        except DataError as error:
            # The image itself is good, and is not put down as a bad one for whoever needs no labels.
            raise UnreadableError(str(error)) from error


def folder_scenes(root: str) -> tuple[Scenes, Scenes]:
    """Open the scenes to train on and those to test on, below a folder of ADE20K's layout; label 0 is no class.

    The classes are those of `objectInfo150.txt`; without it as many as the largest label of the training images says,
    all of which are read. Raises DataError: another layout, no readable image, or an image without its annotation.
    """
    for kind in ("images", "annotations"):
        for part in PARTS:
            if not (Path(root) / kind / part).is_dir():
                raise DataError(
                    f"{Path(root) / kind / part}: no such folder; data.root must hold images/ and annotations/, "
                    f"each with {PARTS[0]}/ and {PARTS[1]}/"
                )
    images = [open_images(str(Path(root) / "images" / part), 3, quiet=False) for part in PARTS]
    paths = [_annotations_of(found, root, part) for found, part in zip(images, PARTS)]
    names = Path(root) / NAMES
    class_names = _names_in(names) if names.is_file() else _numbered(images[0], paths[0])
    labels = [_labels_of(found, of_these, len(class_names)) for found, of_these in zip(images, paths)]
    return tuple(Scenes(found, class_names, of_these) for found, of_these in zip(images, labels))


def _labels_of(images: IndexedSource, paths: list[str], classes: int) -> Callable[[int], np.ndarray]:
    """Return `Scenes.labels` of the files at `paths[id]`, where 0 is no class and k class k - 1."""

    def labels(index: int) -> np.ndarray:
        numbers_HW = _read_annotation(paths[index], images, index)
        if numbers_HW.max() > classes:
            raise DataError(f"{paths[index]}: label {numbers_HW.max()} must be in 0..{classes}, the number of classes")
        # 0 wraps around to 255, which is `IGNORED`.
        return numbers_HW.astype(np.uint8) - np.uint8(1)

    return labels


def _annotations_of(images: IndexedSource, root: str, part: str) -> list[str]:
    """Return the path of each image's annotation: the same name, as PNG."""
    folder, beside = (Path(os.path.abspath(root), kind, part) for kind in ("images", "annotations"))
    paths = []
    for name in map(images.name, range(len(images))):
        paths.append(str(beside / Path(name).relative_to(folder).with_suffix(".png")))
        if not os.path.isfile(paths[-1]):
            raise DataError(f"{paths[-1]}: no such file; it must be there for the image {name}")
    return paths


def _read_annotation(path: str, images: IndexedSource, index: int) -> np.ndarray:
    """Return the numbers in a PNG of whole numbers or a palette, [H, W]. Raises DataError naming the file."""
    expected = tuple(images.sizes_N2[index].tolist())
    try:
        with open_picture(path) as image:
            if (found := image.size[::-1]) == expected and image.mode in _MODES:
                return np.array(image)
            mode = image.mode
    except Exception as error:  # Pillow's plugins raise whatever damaged data lead them to
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error
    if found != expected:
        sizes = [f"{height} x {width}" for height, width in (found, expected)]
        raise DataError(f"{path}: {sizes[0]} pixels, and its image {images.name(index)} has {sizes[1]}")
    raise DataError(f"{path}: an annotation of mode {mode}; it must be of one channel, gray or palette")


def _names_in(path: Path) -> tuple[str, ...]:
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    in_order = [row[0].strip() for row in rows] == [str(number) for number in range(1, len(rows) + 1)]
    if not in_order or not 2 <= len(rows) <= IGNORED:
        raise DataError(f"{path}: must number 2 to {IGNORED} classes from 1 on, a line each below a heading")
    return tuple(row[-1].strip() for row in rows)


def _numbered(images: IndexedSource, paths: list[str]) -> tuple[str, ...]:
    """Return numbers as names, as many as the largest label in these annotations; those that are bad say nothing."""

    def largest_in(index: int) -> int:
        try:
            return int(_read_annotation(paths[index], images, index).max())
        except DataError:  # counted when it is its turn
            return 0

    with ThreadPoolExecutor(thread_count(0)) as pool:
        largest = max(pool.map(largest_in, range(len(paths))))
    if not 2 <= largest <= IGNORED:
        raise DataError(
            f"{paths[0]} and {len(paths) - 1} others: labels 0..{largest}; there must be 2 to {IGNORED} classes"
        )
    return tuple(str(number) for number in range(1, largest + 1))


def shape_scenes(data: DataConfig, seed: int) -> Scenes:
    """Make scenes of shapes on a background, which is the first class; no pixel is ignored. Raises ConfigError."""
    images = build(data, seed)

    def labels(index: int) -> np.ndarray:
        return np.where(images.mask(index), np.uint8(1 + images.labels_N[index]), np.uint8(0))

    return Scenes(images, ("background", *images.class_names), labels)
