"""This module reads published label files: iNaturalist's JSON and Flowers-102's MATLAB files."""

# P images of a split, N images of the set

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Callable

import numpy as np

from ccmim_fast.data.index.folders import row_of_file
from ccmim_fast.data.index.index_file import Listing
from ccmim_fast.data.index.own import open_regular
from ccmim_fast.errors import ConfigError, DataError, one_line

_INATURALIST = "images (id, file_name), annotations (image_id, category_id) and categories (id)"
_FLOWERS = "jpg/image_00001.jpg ..., imagelabels.mat and setid.mat"
_TRAIN, _TEST = "trnid+valid", "tstid"  # 1020 each, the 2040 that papers on vision transformers count; 6149
# MD5 of the files at https://www.robots.ox.ac.uk/~vgg/data/flowers/102/, as in torchvision.datasets.Flowers102
_PUBLISHED = {"imagelabels.mat": "e0620be6f572b9609742df49c70aed4d", "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c"}
_LARGEST = 2**20  # bytes of a MATLAB file; the published ones have less than 2**14


def annotation_reader(origin: str) -> Callable[[str], Listing] | None:
    """Return the function that reads the label file `origin`, or None if `origin` does not name one."""
    if origin.endswith(".json"):
        return read_inaturalist
    # Parts of a set like Flowers-102: `FOLDER/setid.mat#trnid+valid`
    return read_flowers if origin.rpartition("#")[0].endswith(".mat") else None


def inaturalist_origins(root: str, test: str = "") -> tuple[str, str]:
    """Return the annotation files of the training images and of the test images, of one year.

    `root` is `train2018.json` or `train2019.json`, or the folder that has one of them. `test` is empty for `val*.json`
    of the same year, beside it. Raises DataError if it is not clear from the names which files are meant.
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
    """Return the training images (trnid and valid) and the test images (tstid) of Flowers-102.

    Raises DataError without `setid.mat` in the folder `root`, ConfigError if `test` is given.
    """
    if test:
        raise ConfigError(f"data.test={test!r:.100}: setid.mat says what to test on; leave it empty")
    if "setid.mat" not in _listed(root):
        raise DataError(f"data.root={root!r:.200}: no setid.mat in it; expected {_FLOWERS}")
    return tuple(os.path.join(root, f"setid.mat#{parts}") for parts in (_TRAIN, _TEST))


def read_inaturalist(path: str) -> Listing:
    """List the images that an annotation file of iNaturalist names; paths are relative to the file's folder.

    A class is a category, named by its id: names were republished later, so that they may differ between splits. Raises
    DataError if the file is damaged or incomplete, or if the folder of the images is missing.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            content = json.load(file)
        names = {int(one["id"]): one["file_name"] for one in content["images"]}
        pairs = [(int(one["image_id"]), int(one["category_id"])) for one in content["annotations"]]
        categories = sorted({int(one["id"]) for one in content["categories"]})
        for name in names.values():
            if not os.fsencode(name) or "\0" in name:
                raise ValueError(f"file_name={name!r:.60}")
    except OSError as error:
        raise DataError(f"cannot read the annotations {path!r}: {error.strerror}") from None
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        reason = _reason(error, "key")
        raise DataError(f"{path!r}: no annotations of iNaturalist: {reason}; expected {_INATURALIST}") from None
    label_of = {category: label for label, category in enumerate(categories)}
    for image, category in pairs:
        if image not in names or category not in label_of:
            what = f"category {category!r:.40}" if image in names else f"image {image!r:.40}"
            raise DataError(f"{path!r}: an annotation is of {what}, which is not in it; expected {_INATURALIST}")
    category_of = dict(pairs)
    if not len(category_of) == len(pairs) == len(names):
        raise DataError(f"{path!r}: {len(pairs)} annotations of {len(names)} images; expected one of each image")
    digits = len(str(max(categories, default=0)))
    class_names = tuple(f"{category:0{digits}}" for category in categories)
    order = sorted(names, key=lambda image: os.fsencode(names[image]))
    return _listing(path, [(names[image], label_of[category_of[image]]) for image in order], class_names, [path])


def read_flowers(origin: str) -> Listing:
    """List the images of some parts of `setid.mat`, `FOLDER/setid.mat#trnid+valid`, in the order of their numbers.

    Raises DataError if a file is not the published one, a number has no label, or the folder `jpg` is missing.
    """
    path, _, parts = origin.rpartition("#")
    labels_path = os.path.join(os.path.dirname(path), "imagelabels.mat")
    [labels_N] = _arrays(labels_path, ["labels"])
    numbers_P = np.unique(np.concatenate(_arrays(path, parts.split("+"))))
    if not len(labels_N) or not 1 <= labels_N.min() <= labels_N.max() <= len(labels_N):
        raise DataError(f"{labels_path!r}: must hold one label for each image, counted from 1")
    if len(numbers_P) and not 1 <= numbers_P[0] <= numbers_P[-1] <= len(labels_N):
        outside = numbers_P[0] if numbers_P[0] < 1 else numbers_P[-1]
        raise DataError(f"{path!r}: image {outside} has no label; {labels_path!r} has those of 1 .. {len(labels_N)}")
    pairs = [(f"jpg/image_{number:05d}.jpg", int(labels_N[number - 1]) - 1) for number in numbers_P.tolist()]
    return _listing(path, pairs, tuple(f"{label:03d}" for label in range(1, labels_N.max() + 1)), [path, labels_path])


def _arrays(path: str, names: list[str]) -> list[np.ndarray]:
    """Read arrays of whole numbers, [N] int64 each, from a MATLAB file of Flowers-102 with a known MD5.

    Known are that of the published file of this name, and those that `MD5SUMS` beside the file lists for it.
    """
    from scipy.io import loadmat

    try:
        with open(path, "rb", opener=open_regular) as file:
            data = file.read(_LARGEST)
    except OSError as error:
        raise DataError(f"cannot read {path!r}: {error.strerror}; expected {_FLOWERS} in one folder") from None
    # scipy 1.17.1 crashes the process on some damaged files, so that only known bytes may reach it.
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    folder, name = os.path.split(path)
    listed = set()
    with contextlib.suppress(OSError), open(os.path.join(folder, "MD5SUMS"), encoding="utf-8") as file:
        listed = {line.split()[0] for line in file if re.fullmatch(rf"\w{{32}} [ *]{re.escape(name)}\n?", line)}
    if md5 != _PUBLISHED.get(name) and md5 not in listed:
        raise DataError(
            f"{path!r}: its MD5 is {md5}, that of the published file {_PUBLISHED.get(name)}; download it again, or, "
            "if you made it yourself, run `md5sum *.mat > MD5SUMS` in its folder"
        )
    try:
        arrays = loadmat(io.BytesIO(data), variable_names=names)
        found = [arrays[name].reshape(-1) for name in names]
        whole = [numbers.astype(np.int64) for numbers in found]
        if not all(map(np.array_equal, found, whole)):
            raise ValueError("a number that is not whole")
        return whole
    # loadmat raises errors of many types.
    except Exception as error:
        raise DataError(f"{path!r}: no file of Flowers-102: {_reason(error, 'array')}; expected {_FLOWERS}") from None


def _reason(error: Exception, kind: str) -> str:
    """Return one short line; a KeyError says which `kind` of value is missing."""
    return f"no {kind} {error}" if isinstance(error, KeyError) else one_line(error, 100)


def _listing(path: str, pairs: list[tuple[str, int]], class_names: tuple[str, ...], sources: list[str]) -> Listing:
    """List the files of (path from the folder of `path`, label); they depend on `sources` and on their folders."""
    folder = os.path.dirname(os.path.abspath(path))
    for top in sorted({name.split("/")[0] for name, _ in pairs if "/" in name}):
        if not os.path.isdir(os.path.join(folder, top)):
            raise DataError(f"no folder {os.path.join(folder, top)!r}; {path!r} has its images in it")
    rows = [row_of_file(os.path.join(folder, name), folder, label) for name, label in pairs]
    folders = {_nearest_folder(os.path.dirname(os.path.join(folder, name))) for name, _ in pairs}
    dependencies = {place: os.stat(place).st_mtime_ns for place in [*sources, *sorted(folders)]}
    return Listing(folder, rows, class_names, dependencies, [])


def _nearest_folder(folder: str) -> str:
    """Return the folder, or the nearest one above it that exists."""
    return folder if os.path.isdir(folder) else _nearest_folder(os.path.dirname(folder))


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder or "."))
    except OSError as error:
        raise DataError(f"data.root={folder!r:.200}: {error.strerror}; set it to the folder of the set") from None
