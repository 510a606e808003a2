"""This module writes composites: images of one cut-out in front of a background, with exact masks, boxes and labels."""

# N samples, K classes

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ccmim_fast.config.keys import nearest
from ccmim_fast.data.index.indexed import IndexedSource
from ccmim_fast.data.index.left_out import Note, Notes, kind_of, merged, note_lines, told
from ccmim_fast.data.made.base import balanced_labels
from ccmim_fast.data.made.cutout import crop_background, open_background, open_cutout, paste, resized
from ccmim_fast.data.source import usable_count, usable_ids
from ccmim_fast.data.threads import map_ahead, thread_count
from ccmim_fast.errors import ConfigError, DataError
from ccmim_kernels.philox import STREAM_SHAPES, keyed_uniform

PARTS = ("train", "test")
MASKS, ANNOTATIONS = "masks", "annotations"  # folders beside those of the parts
# What `philox` calls the epoch separates these draws from one another, and from those of `base`.
_PURPOSES = {"train": 16, "test": 17}
_PURPOSE_SIDES = 18
_KEPT = 64  # decoded pictures in memory, of each kind
_DRAWS = 9  # random numbers of a sample
_ONE_CLASS = "object"  # the category's name where cut-outs have no classes


class Style(NamedTuple):
    """This tuple has what all samples share."""

    seed: int
    image_size: tuple[int, int]  # height, width
    scale: tuple[float, float]  # least and most of an object's longer side, as a share of the image's shorter one
    flip: bool

    def sides(self) -> tuple[int, int]:
        """Return the least and the most pixels of an object's longer side."""
        least, most = (max(1, round(share * min(self.image_size))) for share in self.scale)
        return least, most


class Part(NamedTuple):
    """This tuple has the cut-outs, of each class, and the backgrounds that one part is made of, by their ids."""

    cutouts: list[list[int]]
    backgrounds: list[int]


class _Pictures:
    """This class decodes the pictures of a source, by `open_one` from their bytes, and notes what is of no use."""

    def __init__(self, source: IndexedSource, open_one: Callable[[bytes], Image.Image], threads: int):
        self.source, self.notes, self._threads = source, Notes(), threads
        self._open_now = lambda index: open_one(source.encoded(index))
        self.open = lru_cache(_KEPT)(self._open_now)

    def ids(self) -> list[int]:
        return usable_ids(self.source, np.arange(usable_count(self.source))).tolist()

    def keys(self, ids: list[int]) -> dict[int, int]:
        """Decode pictures; return the ids of those that are of use, each with a key of its pixels."""
        found: dict[tuple, int] = {}
        for index, key in zip(ids, map_ahead(self._look, ids, self._threads, 8 * self._threads)):
            if isinstance(key, str) or key in found:
                self.notes.add(self.source.name(index), key if isinstance(key, str) else "the same pixels as another")
            else:
                found[key] = index
        return {index: int.from_bytes(digest[:7]) for (_, digest), index in found.items()}

    def left_out(self) -> list[Note]:
        return merged([*self.notes, *told(self.source)])

    def too_few(self, what: str) -> DataError:
        """Return the error for a source without `what`, with the first reason why pictures are left out."""
        line = f"{self.source.origin!r}: no {what} can be used"
        return DataError("; ".join([line, *note_lines(self.left_out())[:1]]))

    def _look(self, index: int) -> tuple[tuple[int, int], bytes] | str:
        """Return the size of a picture and a digest of its pixels, or the reason why it is of no use."""
        try:
            image = self._open_now(index)
        except DataError as error:
            return kind_of(str(error))
        return image.size, hashlib.sha256(image.tobytes()).digest()


class Composer:
    """This class makes composites of the images of two sources.

    `classes` are those that are used, all if empty, and `without` those that are not. Raises ConfigError for a class
    that is not there, and if none is left.
    """

    def __init__(
        self,
        cutouts: IndexedSource,
        backgrounds: IndexedSource,
        style: Style,
        classes: Iterable[str] = (),
        without: Iterable[str] = (),
        workers: int = 0,
    ):
        self._style, self._threads = style, thread_count(workers)
        self.class_names = _chosen(cutouts.class_names, classes, without)
        least, most = style.sides()
        self._cutouts = _Pictures(cutouts, partial(open_cutout, least=least, most=most), self._threads)
        open_one = partial(open_background, image_size=style.image_size)
        self._backgrounds = _Pictures(backgrounds, open_one, self._threads)

    def parts(self, held_out: float) -> dict[str, Part]:
        """Look at all pictures, and tell which are of which part; `held_out` is the share of `test`, 0: both have all.

        Classes that have too few cut-outs are left out. Raises DataError if no class or no background is left.
        """
        of_class = self._by_class()
        keys = self._cutouts.keys([index for ids in of_class.values() for index in ids])
        groups = {name: {index: keys[index] for index in ids if index in keys} for name, ids in of_class.items()}
        least = 2 if held_out else 1
        for name, group in [*groups.items()]:
            if len(group) < least:
                why = "a class of one cut-out, where each part needs one" if group else "a class without a cut-out"
                self._cutouts.notes.add(name, why)
                del groups[name]
        each = ", one for each part," if held_out else ""
        if not groups:
            raise self._cutouts.too_few(("two cut-outs of a class" if held_out else "cut-out") + each)
        background_keys = self._backgrounds.keys(self._backgrounds.ids())
        if len(background_keys) < least:
            raise self._backgrounds.too_few(("two backgrounds" if held_out else "background") + each)
        self.class_names = self.class_names and tuple(groups)
        divided = [self._divided(group, held_out) for group in groups.values()]
        backgrounds = self._divided(background_keys, held_out)
        return {part: Part([sides[n] for sides in divided], backgrounds[n]) for n, part in enumerate(PARTS)}

    def left_out(self) -> list[Note]:
        """Return what is left out of both sources, and why."""
        return merged([*self._cutouts.left_out(), *self._backgrounds.left_out()])

    def write(self, folder: Path, part: str, pictures: Part, samples: int, report: Callable) -> None:
        """Write one part's images, masks and annotations. `report` is called with what is done and the total."""
        labels_N = balanced_labels(self._style.seed, samples, len(pictures.cutouts))
        ids_N = torch.arange(samples)
        u_ND = keyed_uniform(self._style.seed, _PURPOSES[part], ids_N, _DRAWS, STREAM_SHAPES).numpy()
        for place in (folder / part, folder / MASKS / part):
            for name in self.class_names or ("",):
                (place / name).mkdir(parents=True, exist_ok=True)
        (folder / ANNOTATIONS).mkdir(exist_ok=True)
        write_one = partial(self._write_one, folder, part, pictures)
        rows = []
        for row in map_ahead(write_one, zip(range(samples), labels_N.tolist(), u_ND), self._threads, 8 * self._threads):
            rows.append(row)
            report(len(rows), samples)
        images, annotations = ([row[n] for row in rows] for n in (0, 1))
        categories = [{"id": n + 1, "name": name} for n, name in enumerate(self._categories())]
        info = {"description": f"ccmim data composite, {part}", **self._style._asdict()}
        content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
        (folder / ANNOTATIONS / f"instances_{part}.json").write_text(json.dumps(content))

    def _write_one(self, folder: Path, part: str, pictures: Part, sample: tuple) -> tuple[dict, dict]:
        """Write one image and its mask; return its rows of the annotations."""
        index, label, u_D = sample
        cutout, background = (_pick(ids, u) for ids, u in zip((pictures.cutouts[label], pictures.backgrounds), u_D))
        image_HW3, mask_HW = self._draw(cutout, background, u_D[2:])
        name = "/".join((*self.class_names[label : label + 1], f"{index:06d}.png"))
        Image.fromarray(image_HW3).save(folder / part / name)
        Image.fromarray(mask_HW.astype(np.uint8) * 255).save(folder / MASKS / part / name)
        height, width = mask_HW.shape
        image = {"id": index + 1, "file_name": name, "height": height, "width": width}
        image["cutout"] = self._cutouts.source.index.location(cutout)
        image["background"] = self._backgrounds.source.index.location(background)
        return image, {"id": index + 1, "image_id": index + 1, "category_id": label + 1, **described(mask_HW)}

    def _draw(self, cutout: int, background: int, u_7: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (height, width), (least, most) = self._style.image_size, self._style.sides()
        background_HW3 = crop_background(self._backgrounds.open(background), self._style.image_size, u_7[4:])
        object_hw4 = resized(self._cutouts.open(cutout), least + int(u_7[0] * (most - least + 1)))
        if self._style.flip and u_7[1] < 0.5:
            object_hw4 = object_hw4[:, ::-1]
        y, x = (int(u * (all_ - own + 1)) for u, all_, own in zip(u_7[2:], (height, width), object_hw4.shape))
        return paste(background_HW3, object_hw4, y, x)

    def _by_class(self) -> dict[str, list[int]]:
        """Return the ids of the cut-outs of each class; those that have none, where others have one, are noted."""
        source, found = self._cutouts.source, {name: [] for name in self._categories()}
        for index in self._cutouts.ids():
            if not source.class_names:
                found[_ONE_CLASS].append(index)
            elif source.labels_N[index] < 0:
                self._cutouts.notes.add(source.name(index), "a cut-out in no folder of a class")
            elif (name := source.class_names[source.labels_N[index]]) in found:
                found[name].append(index)
        return found

    def _categories(self) -> tuple[str, ...]:
        return self.class_names or (_ONE_CLASS,)

    def _divided(self, keys: dict[int, int], held_out: float) -> tuple[list[int], list[int]]:
        """Divide pictures in two by what is drawn for their content, one at least on each side; 0: each side has all.

        A picture that is renamed stays on its side.
        """
        if not held_out:
            return [*keys], [*keys]
        u_N = keyed_uniform(self._style.seed, _PURPOSE_SIDES, torch.tensor([*keys.values()]), 1, STREAM_SHAPES)[:, 0]
        count = min(len(keys) - 1, max(1, round(held_out * len(keys))))
        test = {[*keys][n] for n in u_N.argsort()[:count].tolist()}
        return [index for index in keys if index not in test], [index for index in keys if index in test]


def described(mask_HW: np.ndarray) -> dict[str, Any]:
    """Return what COCO's annotations say of a mask: its box x, y, width, height, its area, and its runs by columns."""
    rows, columns = (np.flatnonzero(mask_HW.any(axis)) for axis in (1, 0))
    flat = mask_HW.T.ravel()
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff([*([0] if flat[0] else []), 0, *ends, flat.size]).tolist()  # the first run is outside, maybe empty
    x, y = int(columns[0]), int(rows[0])
    return {
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(mask_HW.sum()),
        "iscrowd": 0,
        "segmentation": {"size": [*mask_HW.shape], "counts": runs},
    }


def _chosen(names: tuple[str, ...], classes: Iterable[str], without: Iterable[str]) -> tuple[str, ...]:
    for option, asked in (("--classes", classes), ("--without", without)):
        for name in asked:
            if name not in names:
                near = (
                    f"; did you mean {nearest(name, names)!r}?" if names else ": cut-outs lie in no folders of classes"
                )
                raise ConfigError(f"{option} {name!r:.80}: no such class{near}")
    left = tuple(name for name in names if (not classes or name in classes) and name not in without)
    if names and not left:
        raise ConfigError("--without: no class is left")
    return left


def _pick(ids: list[int], u: float) -> int:
    return ids[int(u * len(ids))]
