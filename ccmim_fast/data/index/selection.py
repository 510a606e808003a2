"""One rule says which files of a folder, of a URL or of a tar are samples, which sample is of which class.

Names are paths with slashes from the folder, the URL or within the tar.
"""

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from ccmim_fast.data.index.endings import COMPANIONS, CONTAINERS, FORMATS, UNREAD, file_suffixes
from ccmim_fast.data.index.left_out import LOST, MEANT, OTHER, Notes
from ccmim_fast.data.index.own import BESIDE

OUTSIDE = {  # the training part of a set, and the kinds of these reasons
    "held out: of the parts of the set the training part alone is used": MEANT,
    "beside the training part of the set, in none of its parts": LOST,
}
_TRAIN, _HELD_OUT = ("train", "training"), ("val", "valid", "validation", "test", "testing", "dev", "eval")
_WORDS = "|".join((*_TRAIN, *_HELD_OUT))
# A folder `train`, `train2017`, `test_images`, `ILSVRC2012_img_val`; of classes `bullet_train` and `test_tube` neither.
_PART = re.compile(rf"(?:.*_img_)?({_WORDS})[-_]?(?:\d+|images?|imgs?|set|data)?", re.IGNORECASE)
# The first or last word of a tar's or table's name: `train-00000-of-00002.parquet`, `mnist_test.parquet`.
_FILE = re.compile(rf"({_WORDS})(?=[-_.\d])|.*[-_.]({_WORDS})(?=[-_\d]*\.\w+$)", re.IGNORECASE)
# Members `x.seg.png` beside `x.jpg` that show something other than the photograph.
_ANNOTATIONS = ("seg", "segm", "segmentation", "semantic", "panoptic", "instance", "instances", "mask", "masks")
_ANNOTATIONS += ("matte", "alpha", "depth", "disparity", "flow", "normal", "normals", "edge", "edges")
_ANNOTATIONS += ("label", "labels", "gt")
_UNNAMED = "an image whose name ends in none of an image's endings"
_ORDER = tuple(ending[1:] for kind in FORMATS for ending in kind.endings)  # of the images of one sample


def select(
    names: Sequence[str], channels: int, image_key: str, notes: Notes, is_image: Callable[[str], bool]
) -> tuple[list[str], list[str]]:
    """Return the images and the containers among the visible files of a folder or URL; notes say what is left out.

    `is_image` tells of a file of an unknown ending if its content is an image's. Where tars or tables lie beside
    images, those are the set of which there are more: a picture beside tables, or an old tar beside a tree.
    """
    images, containers = by_ending(visible(names, channels, notes), channels, image_key, notes, is_image)
    images, containers = training_part(images, notes), training_part(containers, notes)
    if containers and len(images) > len(containers):
        for name in containers:
            notes.add(name, "a tar or table beside more images than tars; name it in data.root to read it")
        containers = []
    for name in images if containers else []:
        notes.add(name, "an image beside tars or tables, which are read instead of it")
    return ([], containers) if containers else (samples(images, image_key, notes, one_per_key=False), [])


def visible(names: Iterable[str], channels: int, notes: Notes) -> list[str]:
    """Return the names of which no part begins with a dot; images among the others are noted."""
    kept, suffixes = [], file_suffixes(channels)
    for name in names:
        if (name.startswith(".") or "/." in name) and any(map(_is_hidden, name.split("/"))):
            if name.lower().endswith(suffixes):
                notes.add(name, "a name that begins with a dot", MEANT)
        else:
            kept.append(name)
    return kept


def _is_hidden(part: str) -> bool:
    return part.startswith(".") and part not in (".", "..")


def by_ending(
    names: Iterable[str], channels: int, image_key: str, notes: Notes, is_image: Callable[[str], bool]
) -> tuple[list[str], list[str]]:
    """Return the images and the containers among names, by their endings; the others are noted."""
    images, containers, suffixes = [], [], file_suffixes(channels)
    others = tuple({*file_suffixes(3), *file_suffixes(0)} - {*suffixes})  # of other numbers of channels
    keys = tuple("." + key for key in keys_of(image_key))
    for name in names:
        lower = name.lower()
        if posixpath.basename(name) == BESIDE:
            continue
        if lower.endswith(suffixes) or (keys and lower.endswith(keys)):
            images.append(name)
        elif lower.endswith(CONTAINERS):
            containers.append(name)
        elif lower.endswith(others):
            notes.add(name, f"an ending that is not read with data.channels={channels}", MEANT)
        elif lower.endswith(COMPANIONS):
            notes.add(name, "an ending of no image", OTHER)
        elif lower.endswith(UNREAD):
            notes.add(name, "a format that is not read; write it as PNG, TIFF or JPEG, an archive as .tar")
        elif is_image(name):
            notes.add(name, f"{_UNNAMED}; rename it, or write it as PNG, TIFF or JPEG")
        else:
            notes.add(name, "an unknown ending", MEANT)
    return images, containers


def training_part(names: list[str], notes: Notes) -> list[str]:
    """Return the names below `train/` if `val/` or `test/` lies beside it, else all.

    That may be below folders that all names share. Tars and tables with such names are told apart alike.
    """
    outside = outside_training(names)
    for name in names if outside else []:
        if name in outside:
            notes.add(name, *outside[name])
    return [name for name in names if name not in outside] if outside else names


def outside_training(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return the names that `training_part` leaves out, each with the reason and its kind."""
    depth = _shared(names).count("/")
    words = [_split_of(name, depth) for name in names]
    found = {*words}
    if not (found & {*_TRAIN} and found & {*_HELD_OUT}):
        return {}
    held_out, beside = OUTSIDE.items()
    return {name: held_out if word in _HELD_OUT else beside for name, word in zip(names, words) if word not in _TRAIN}


def _shared(names: Sequence[str]) -> str:
    """Return the first folders that all names share, with the slash behind them, or ""."""
    first, last = min(names, default=""), max(names, default="")
    same = next((n for n, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return first[: first.rfind("/", 0, same) + 1]


def _split_of(name: str, depth: int) -> str:
    """Return train, val, ... if the folder at a depth of the name, or a container's file name, says so; else ""."""
    parts = name.split("/", depth + 1)
    if len(parts) > depth + 1 and (word := _part_of(parts[depth])):
        return word
    if not name.lower().endswith(CONTAINERS):
        return ""
    word = _FILE.match(posixpath.basename(name))
    return (word[1] or word[2]).lower() if word else ""


@lru_cache(2**16)
def _part_of(folder: str) -> str:
    """Return train, val, ... if a folder's name says so; else ""."""
    part = _PART.fullmatch(folder)
    return part[1].lower() if part else ""


def keys_of(image_key: str) -> list[str]:
    """Return the suffixes that `data.image_key` names: `jpg`, or `jpg;png` in the order of choice."""
    return [key.strip().lstrip(".").lower() for key in re.split(r"[;,]", image_key) if key.strip(" .")]


def samples(images: list[str], image_key: str, notes: Notes, one_per_key: bool) -> list[str]:
    """Return the image of each sample, in the order of the names.

    A sample is a key: the name up to the first dot behind the folders, as WebDataset says. With `image_key` its image
    is the member with that suffix. Without one, the first whose suffix is an image's ending alone (`x.jpg`), and
    `x.seg.png` beside it is left out; without such a member each is a sample of its own (`a.1.jpg`, `a.2.jpg`), but
    for what is named as a mask or another annotation. Not `one_per_key`: of a sample only annotations are left out.
    """
    if not image_key and not one_per_key and not any(posixpath.basename(name).count(".") > 1 for name in images):
        return images
    members: dict[str, list[tuple[str, str]]] = {}
    for name in images:
        key, suffix = key_of(name)
        members.setdefault(key, []).append((suffix, name))
    taken = set()
    for group in members.values():
        found = _chosen(group, keys_of(image_key), one_per_key)
        taken.update(found)
        for _, name in group if not found else []:
            words = f"no member of data.image_key={image_key}" if image_key else "a mask or another annotation alone"
            notes.add(name, f"a sample without an image: {words}", LOST)
        for _, name in group if found else []:
            if name not in taken:
                notes.add(name, "another member of a sample; data.image_key says which is its image", MEANT)
    return [name for name in images if name in taken]


def key_of(name: str) -> tuple[str, str]:
    """Return WebDataset's key of a member and the suffix behind it, in lower case and without its first dot."""
    folder, base = posixpath.split(name)
    stem, _, suffix = base.partition(".")
    return posixpath.join(folder, stem), suffix.lower()


def _chosen(group: list[tuple[str, str]], keys: list[str], one_per_key: bool) -> list[str]:
    """Return which members (suffix, name) of one key are images of samples."""
    if keys:
        return [name for key in keys for suffix, name in group if suffix == key][:1]
    plain = [(suffix, name) for suffix, name in group if "." not in suffix]
    free = [name for suffix, name in group if "." in suffix and suffix.split(".")[-2] not in _ANNOTATIONS]
    if not plain:
        return free
    if not one_per_key:
        return [*(name for _, name in plain), *free]
    numbered = [name for suffix, name in group if "." in suffix and not suffix[0].isalpha()]
    return [min(plain, key=lambda one: _ORDER.index(one[0]) if one[0] in _ORDER else len(_ORDER))[1], *numbered]


def folder_labels(names: Sequence[str], folders: Iterable[str] = ()) -> tuple[tuple[str, ...], list[int]]:
    """Return the classes, first folders of names, and the label of each; -1 for a name that lies in none.

    If all lie below one folder `train`, the folders in it are the classes. `folders` without images are classes too.
    """
    plain = [posixpath.normpath(name) if "./" in name or "//" in name else name for name in names]
    top = _shared(plain).split("/")[:-1]
    start = next((n + 1 for n, folder in enumerate(top) if _part_of(folder) in _TRAIN), 0)
    parts = (name.split("/", start + 1) for name in plain)
    firsts = [part[start] if len(part) > start + 1 and part[0] not in ("", "..") else None for part in parts]
    known = {first for first in firsts if first is not None}
    if not known:
        return (), [-1] * len(names)
    inner = (folder.split("/") for folder in folders)
    known |= {part[start] for part in inner if len(part) == start + 1 and part[:start] == top[:start]}
    classes = tuple(sorted(known, key=os.fsencode))
    label_of = {name: label for label, name in enumerate(classes)}
    return classes, [label_of.get(first, -1) for first in firsts]
