"""Sets whose owners tell the classes of their images in a file beside them: iNaturalist 2018 and 2019, Flowers-102."""

import json
import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from ccmim_fast.data.index.folders import Found, file_at
from ccmim_fast.data.index.matlab import read_arrays
from ccmim_fast.errors import ConfigError, DataError

_INATURALIST = "images (id, file_name), annotations (image_id, category_id) and categories (id)"
_FLOWERS = "jpg/image_00001.jpg ..., imagelabels.mat and setid.mat"
_TRAINED, _TESTED = "trnid+valid", "tstid"  # 1020 each, the 2040 that papers on vision transformers count; 6149


def inaturalist_origins(root: str, test: str = "") -> tuple[str, str]:
    """The annotations of the images to train on and to test on, of one year.

    Args:
        root: the folder with `train2018.json` or `train2019.json` and `val` alike; or the former file.
        test: the annotations to test on; empty: those of validation beside the others.

    Raises:
        DataError: there are none, or those of several years, or `test` cannot be told from the name.
    """
    train = root
    if not root.endswith(".json"):
        found = [name for name in _listed(root) if re.fullmatch(r"train20\d\d\.json", name)]
        if len(found) != 1:
            what = "holds " + " and ".join(found) if found else "no train2018.json or train2019.json"
            raise DataError(
                f"data.root={root!r:.200}: {what}; name one file of them, val*.json and the images beside it"
            )
        train = os.path.join(root, found[0])
    folder, name = os.path.split(train)
    if not (test or name.startswith("train")):
        raise DataError(f"data.root={root!r:.200}: is not named train*.json; say in data.test what to test on")
    return train, test or os.path.join(folder, name.replace("train", "val", 1))


def flowers_origins(root: str, test: str = "") -> tuple[str, str]:
    """The images of Flowers-102 to train on (trnid and valid) and to test on (tstid).

    Raises:
        DataError: no `setid.mat` in the folder `root`.
        ConfigError: `test` is given.
    """
    if test:
        raise ConfigError(f"data.test={test!r:.100}: setid.mat says what to test on; leave it empty")
    if "setid.mat" not in _listed(root):
        raise DataError(f"data.root={root!r:.200}: no setid.mat in it; expected {_FLOWERS}")
    return tuple(os.path.join(root, f"setid.mat#{parts}") for parts in (_TRAINED, _TESTED))


def is_flowers(origin: str) -> bool:
    """Whether it names parts of a set like Flowers-102: `FOLDER/setid.mat#trnid+valid`."""
    return origin.rpartition("#")[0].endswith(".mat")


def read_inaturalist(path: str) -> Found:
    """The images that annotations of iNaturalist name; their paths are relative to the folder of the annotations.

    A class is a category, named by its id: names were published anew later, so one split may have others than another.

    Raises:
        DataError: it is no such file, an annotation is of an unknown image or category, an image has not exactly one,
            or the folder of the images is not there.
    """
    names, pairs, categories = _annotations(path)
    for image, category in pairs:
        if image not in names or category not in categories:
            what = f"category {category!r:.40}" if image in names else f"image {image!r:.40}"
            raise DataError(f"{path!r}: an annotation is of {what}, which is not in it; expected {_INATURALIST}")
    category_of = dict(pairs)
    if not len(category_of) == len(pairs) == len(names):
        raise DataError(f"{path!r}: {len(pairs)} annotations of {len(names)} images; expected one of each image")
    digits = len(str(max(categories, default=0)))
    class_names = tuple(f"{category:0{digits}}" for category in sorted(categories))
    label_of = {category: label for label, category in enumerate(sorted(categories))}
    order = sorted(names, key=lambda image: os.fsencode(names[image]))
    return _found(path, [(names[image], label_of[category_of[image]]) for image in order], class_names, [path])


def read_flowers(origin: str) -> Found:
    """The images of some parts of `setid.mat`, `FOLDER/setid.mat#trnid+valid`, in the order of their numbers.

    Raises:
        DataError: damaged files, a number without a label, or no folder `jpg`.
    """
    path, _, parts = origin.rpartition("#")
    labels_path = os.path.join(os.path.dirname(path), "imagelabels.mat")
    [labels_N] = _arrays(labels_path, ["labels"])
    numbers_P = np.unique(np.concatenate(_arrays(path, parts.split("+"))))
    if not len(labels_N) or not 1 <= labels_N.min() <= labels_N.max() <= len(labels_N):
        raise DataError(f"{labels_path!r}: must hold one label for each image, counted from 1")
    if len(numbers_P) and not 1 <= numbers_P[0] <= numbers_P[-1] <= len(labels_N):
        far = numbers_P[0] if numbers_P[0] < 1 else numbers_P[-1]
        raise DataError(f"{path!r}: image {far} has no label; {labels_path!r} has those of 1 .. {len(labels_N)}")
    pairs = [(f"jpg/image_{number:05d}.jpg", int(labels_N[number - 1]) - 1) for number in numbers_P.tolist()]
    return _found(path, pairs, tuple(f"{label:03d}" for label in range(1, labels_N.max() + 1)), [path, labels_path])


def _annotations(path: str) -> tuple[dict[int, str], list[tuple[int, int]], set[int]]:
    """File name by image, (image, category) of each annotation, and the categories."""
    try:
        with open(path, "rb") as file:
            said = json.load(file)
        names = {int(one["id"]): _path(one["file_name"]) for one in said["images"]}
        pairs = [(int(one["image_id"]), int(one["category_id"])) for one in said["annotations"]]
        return names, pairs, {int(one["id"]) for one in said["categories"]}
    except OSError as error:
        raise DataError(f"cannot read the annotations {path!r}: {error.strerror}") from None
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:100]
        raise DataError(f"{path!r}: no annotations of iNaturalist: {reason}; expected {_INATURALIST}") from None


def _path(name: Any) -> str:
    """A file name, if a file can have it. Raises TypeError or ValueError."""
    if not os.fsencode(name) or "\0" in name:
        raise ValueError(f"file_name={name!r:.60}")
    return name


def _arrays(path: str, names: Iterable[str]) -> list[np.ndarray]:
    """Whole numbers of a MATLAB file, [N] int64 each."""
    try:
        with open(path, "rb") as file:
            said = read_arrays(file.read())
        found = [said[name] for name in names]
        whole = [row.astype(np.int64) for row in found]
        if not all(map(np.array_equal, found, whole)):
            raise ValueError("a number that is not whole")
        return whole
    except OSError as error:
        raise DataError(f"cannot read {path!r}: {error.strerror}; expected {_FLOWERS} in one folder") from None
    except (ValueError, KeyError) as error:
        reason = f"no array {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:100]
        raise DataError(f"{path!r}: no file of Flowers-102: {reason}; expected {_FLOWERS}") from None


def _found(path: str, pairs: list[tuple[str, int]], class_names: tuple[str, ...], told_by: list[str]) -> Found:
    """The files of (path from the folder of `path`, label), with what changes when some of them come or go."""
    folder = os.path.dirname(os.path.abspath(path))
    for top in sorted({name.split("/")[0] for name, _ in pairs if "/" in name}):
        if not os.path.isdir(os.path.join(folder, top)):
            raise DataError(f"no folder {os.path.join(folder, top)!r}; {path!r} has its images in it")
    files = [file_at(os.path.join(folder, name), label) for name, label in pairs]
    folders = {_existing(os.path.dirname(file.path)) for file in files}
    watched = {place: os.stat(place).st_mtime_ns for place in [*told_by, *sorted(folders)]}
    return Found(files, class_names, watched, [])


def _existing(folder: str) -> str:
    """The folder, or the nearest one above it that is there."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder or "."))
    except OSError as error:
        raise DataError(f"data.root={folder!r:.200}: {error.strerror}; set it to the folder of the set") from None
