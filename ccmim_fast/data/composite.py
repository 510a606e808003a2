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
from ccmim_fast.data.index.left_out import Notes, without_name
from ccmim_fast.data.made.base import balanced_labels
from ccmim_fast.data.made.cutout import crop_background, open_background, open_cutout, paste, resized
from ccmim_fast.data.source import usable_ids
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


class Pictures(NamedTuple):
    """This tuple has the cut-outs, of each class, and the backgrounds that one part is made of, by their ids."""

    cutouts: list[list[int]]
    backgrounds: list[int]


class Composer:
    """This class makes composites of the images of two sources; what is left out, and why, is in `notes`.

    `classes` are those that are used, all if empty, and `without` those that are not. Raises ConfigError for a class
    that is not there, DataError if no cut-out or no background is left.
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
        self._cutouts, self._backgrounds, self._style, self.notes = cutouts, backgrounds, style, Notes()
        self._threads = thread_count(workers)
        self.class_names = _chosen(cutouts.class_names, classes, without)
        self._open_cutout = lru_cache(_KEPT)(lambda index: open_cutout(cutouts.encoded(index), *style.sides()))
        self._open_background = lru_cache(_KEPT)(
            lambda index: open_background(backgrounds.encoded(index), style.image_size)
        )

    def pictures(self, held_out: float) -> dict[str, Pictures]:
        """Look at all pictures, and tell which are of which part; `held_out` is the share of the part `test`, or 0."""
        ids = usable_ids(self._cutouts, np.arange(len(self._cutouts) - len(self._cutouts.excluded_X))).tolist()
        names, labels_N = self._cutouts.class_names, self._cutouts.labels_N
        label_of = {index: names[labels_N[index]] if labels_N[index] >= 0 else "" for index in ids} if names else {}
        for index in ids:
            if names and not label_of[index]:
                self.notes.add(self._cutouts.name(index), "a cut-out in no folder of a class")
        chosen = [index for index in ids if not names or label_of[index] in self.class_names]
        keys = self._usable(self._cutouts, self._open_cutout, chosen)
        groups = [[index for index in keys if not names or label_of[index] == name] for name in self._categories()]
        ids = usable_ids(self._backgrounds, np.arange(len(self._backgrounds) - len(self._backgrounds.excluded_X)))
        background_keys = self._usable(self._backgrounds, self._open_background, ids.tolist())
        return self._divided(groups, keys, background_keys, held_out)

    def _divided(self, groups: list[list[int]], keys: dict, background_keys: dict, held_out: float) -> dict:
        needed = 2 if held_out else 1
        kept = []
        for name, group in zip(self._categories(), groups):
            if len(group) < needed:
                self.notes.add(name, f"a class of {len(group)} cut-outs: {needed} are needed, none in both sets")
            else:
                kept.append((name, group))
        if not kept:
            raise DataError(f"{self._cutouts.origin!r}: no class has {needed} cut-outs that can be used")
        if len(background_keys) < needed:
            raise DataError(f"{self._backgrounds.origin!r}: {needed} backgrounds are needed, none in both sets")
        if self.class_names:
            self.class_names = tuple(name for name, _ in kept)
        sides = [self._split({index: keys[index] for index in group}, held_out) for _, group in kept]
        backgrounds = self._split(background_keys, held_out)
        return {part: Pictures([side[n] for side in sides], backgrounds[n]) for n, part in enumerate(PARTS)}

    def write(self, folder: Path, part: str, pictures: Pictures, samples: int, report: Callable) -> None:
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

    def _write_one(self, folder: Path, part: str, pictures: Pictures, sample: tuple) -> tuple[dict, dict]:
        """Write one image and its mask; return its rows of the annotations."""
        index, label, u_D = sample
        cutout, background = (_pick(ids, u) for ids, u in zip((pictures.cutouts[label], pictures.backgrounds), u_D))
        image_HW3, mask_HW = self._draw(cutout, background, u_D[2:])
        name = "/".join((*self.class_names[label : label + 1], f"{index:06d}.png"))
        Image.fromarray(image_HW3).save(folder / part / name)
        Image.fromarray(mask_HW.astype(np.uint8) * 255).save(folder / MASKS / part / name)
        height, width = mask_HW.shape
        image = {"id": index + 1, "file_name": name, "height": height, "width": width}
        image["cutout"], image["background"] = self._cutouts.name(cutout), self._backgrounds.name(background)
        return image, {"id": index + 1, "image_id": index + 1, "category_id": label + 1, **described(mask_HW)}

    def _draw(self, cutout: int, background: int, u_7: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (height, width), (least, most) = self._style.image_size, self._style.sides()
        background_HW3 = crop_background(self._open_background(background), self._style.image_size, u_7[4:])
        object_hw4 = resized(self._open_cutout(cutout), least + int(u_7[0] * (most - least + 1)))
        if self._style.flip and u_7[1] < 0.5:
            object_hw4 = object_hw4[:, ::-1]
        y, x = (int(u * (all_ - own + 1)) for u, all_, own in zip(u_7[2:], (height, width), object_hw4.shape))
        return paste(background_HW3, object_hw4, y, x)

    def _categories(self) -> tuple[str, ...]:
        return self.class_names or (_ONE_CLASS,)

    def _usable(self, source: IndexedSource, open_one: Callable, ids: list[int]) -> dict[int, int]:
        """Decode pictures; return those that are of use, each with a key of its content. The others are noted."""

        def look(index: int) -> bytes | str:
            try:
                return hashlib.sha256(open_one.__wrapped__(index).tobytes()).digest()
            except DataError as error:
                return without_name(str(error))

        found: dict[bytes, int] = {}
        for index, key in zip(ids, map_ahead(look, ids, self._threads, 8 * self._threads)):
            if isinstance(key, str) or key in found:
                self.notes.add(source.name(index), key if isinstance(key, str) else "the same pixels as another one")
            else:
                found[key] = index
        return {index: int.from_bytes(key[:7]) for key, index in found.items()}

    def _split(self, keys: dict[int, int], held_out: float) -> tuple[list[int], list[int]]:
        """Divide pictures in two by what is drawn for their content: one at least on each side, unless none is asked.

        A picture that is renamed stays on its side.
        """
        if not held_out:
            return [*keys], []
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
    return tuple(name for name in names if (not classes or name in classes) and name not in without)


def _pick(ids: list[int], u: float) -> int:
    return ids[int(u * len(ids))]
