"""Images whose objects are known, with box, class and mask of each: COCO as its owners publish it, or shapes.

To a `Source` they add `instances(index)`: the objects of one image, or DataError naming the image. `excluded_X` are the
images without an object to train on.
"""

# N objects, S samples, X excluded samples, H height, W width, C channels

import hashlib
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ccmim_fast.data.index.decode import BYTE, decode
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.source import NOTHING_EXCLUDED
from ccmim_fast.errors import DataError, one_line

LAYOUT = (
    "data.root holds annotations/instances_train2017.json and instances_val2017.json beside train2017/ and val2017/"
)
# What is read of the file: the lists, and what each row of them must have.
_ROWS = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "categories": {"id": int, "name": str},
    "annotations": {
        **{"id": int, "image_id": int, "category_id": int, "bbox": list, "iscrowd": int},
        "segmentation": (list, dict),
    },
}
_LEAST_SIDE = 1  # pixels; an image whose boxes are all as narrow is not trained on (torchvision's reference)


class Instances(NamedTuple):
    """This tuple describes the objects of an image."""

    boxes_N4: np.ndarray  # float32 x0, y0, x1, y1 in pixels, the last two exclusive
    labels_N: np.ndarray  # int64 indices into the source's `class_names`
    masks_NHW: np.ndarray  # bool
    crowd_N: np.ndarray  # bool, regions of many objects: no one trains on them, and what is found there is no mistake


class ShapesInstances(ShapesSource):
    """Images made by code, whose one object is known to the pixel."""

    def instances(self, index: int) -> Instances:
        y0, x0, y1, x1 = self.box(index)
        mask_HW = np.array(self.mask(index))  # the cache is read-only, which torch does not like
        box_14 = np.array([[x0, y0, x1, y1]], dtype=np.float32)
        return Instances(box_14, self.labels_N[index : index + 1], mask_HW[None], np.zeros(1, dtype=bool))


class CocoSource:
    """One of COCO's two parts; as much of a `Source` as evaluations ask for.

    `root` is a folder of the layout above, `part` is `train2017` or `val2017`. With `train`, images without an object
    to train on are excluded. Raises DataError: a file that is missing, damaged, or speaks of what is not there.
    """

    channels, dtype = 3, BYTE
    labels_N = None  # an image has many

    def __init__(self, root: str, part: str, train: bool) -> None:
        file, self._folder = Path(root, "annotations", f"instances_{part}.json"), Path(root, part)
        text = _read(file, f"; {LAYOUT}")
        content = _parse(text, file)
        images = sorted(content["images"], key=lambda image: image["id"])
        categories = sorted(content["categories"], key=lambda category: category["id"])
        if not self._folder.is_dir():
            raise DataError(f"{self._folder}: no such folder; {LAYOUT}")
        if missing := {image["file_name"] for image in images} - set(os.listdir(self._folder)):
            raise DataError(f"{self._folder}: lacks {len(missing)} of the images in {file}, such as {min(missing)}")
        self.class_names = tuple(category["name"] for category in categories)
        self.sizes_N2 = np.array([(image["height"], image["width"]) for image in images], dtype=np.int32).reshape(-1, 2)
        self._names = np.array([image["file_name"] for image in images])
        of_images = _by_image(content["annotations"], images, categories, file)
        least = _LEAST_SIDE if train else -np.inf
        usable = [any(not crowd and min(box[2:]) > least for _, _, box, crowd, _ in objects) for objects in of_images]
        if not any(usable):
            raise DataError(f"{file}: no image of it has an object to {'train' if train else 'test'} on")
        without_X = np.flatnonzero(~np.array(usable))
        self.excluded_X = without_X if train else NOTHING_EXCLUDED
        # One block of bytes: objects of Python's would be copied into every process that reads them.
        parts = [json.dumps(objects).encode() for objects in of_images]
        self._ends = np.cumsum([0, *map(len, parts)])
        self._objects = np.frombuffer(b"".join(parts), dtype=np.uint8)
        self.fingerprint = f"coco-{part}-{hashlib.sha256(text).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return str(self._folder / self._names[index])

    def decode(self, index: int) -> np.ndarray:
        try:
            image_HWC = decode(_read(Path(self.name(index))), self.channels)
        except DataError as error:
            raise DataError(f"{self.name(index)}: {error}") from None
        if image_HWC.shape[:2] != tuple(self.sizes_N2[index]):
            found, said = (" x ".join(map(str, size)) for size in (image_HWC.shape[:2], self.sizes_N2[index]))
            raise DataError(f"{self.name(index)}: {found} pixels; its annotations are of {said}")
        return image_HWC

    def instances(self, index: int) -> Instances:
        objects = json.loads(self._objects[self._ends[index] : self._ends[index + 1]].tobytes())
        height, width = (int(side) for side in self.sizes_N2[index])
        masks_NHW = np.zeros((len(objects), height, width), dtype=bool)
        for mask_HW, (number, *_, segmentation) in zip(masks_NHW, objects):
            try:
                mask_HW[:] = mask_of(segmentation, height, width)
            except (ValueError, TypeError, KeyError, RuntimeError) as error:
                where = f"{self.name(index)}: segmentation of annotation {number}"
                raise DataError(f"{where}: {one_line(error, 100)}") from None
        corners_N4 = np.array([box for _, _, box, *_ in objects], dtype=np.float32).reshape(-1, 4)
        corners_N4[:, 2:] += corners_N4[:, :2]
        return Instances(
            corners_N4.clip(0, [width, height, width, height]).astype(np.float32),
            np.array([label for _, label, *_ in objects], dtype=np.int64),
            masks_NHW,
            np.array([crowd for *_, crowd, _ in objects], dtype=bool),
        )


def mask_of(segmentation: list[list[float]] | dict[str, Any], height: int, width: int) -> np.ndarray:
    """Return [H, W] bool of polygons (x, y, x, y, ...), or of runs down the columns, compressed to text or not.

    Raises ValueError: a polygon of fewer than three points, or runs of another size.
    """
    from faster_coco_eval import mask

    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"is of {segmentation['size']} pixels, its image of {[height, width]}")
        plain = isinstance(segmentation["counts"], list)
        if plain and sum(segmentation["counts"]) != height * width:
            raise ValueError(f"its runs cover {sum(segmentation['counts'])} pixels of {height * width}")
        runs = mask.frPyObjects(segmentation, height, width) if plain else segmentation
    else:
        if not segmentation or any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
            raise ValueError("a polygon has an x and a y for each of three points or more")
        runs = mask.merge(mask.frPyObjects(segmentation, height, width))
    return mask.decode(runs).astype(bool)


def _read(file: Path, advice: str = "") -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}{advice}") from None


def _parse(text: bytes, file: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the lists of `_ROWS`. Raises DataError naming the first row that is not as it must be."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: damaged: {error}") from None
    for name, needed in _ROWS.items():
        rows = content.get(name) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{file}: no list of {name} in it, as COCO's instances have")
        for row in rows:
            for key, kind in needed.items():
                if not isinstance(row.get(key), kind):
                    said = repr(row[key])[:60] if key in row else "missing"
                    raise DataError(f"{file}: {name}: {key} of {row.get('id', 'one')!r:.60} is {said}")
    if not content["images"]:
        raise DataError(f"{file}: no image in it")
    return content


def _by_image(annotations: list, images: list, categories: list, file: Path) -> list[list[tuple]]:
    """Return the objects of each image: number, label, box (x, y, width, height), crowd, segmentation."""
    labels = {category["id"]: label for label, category in enumerate(categories)}
    found = defaultdict(list, {image["id"]: [] for image in images})
    for one in annotations:
        number, image, category = one["id"], one["image_id"], one["category_id"]
        if image not in found:
            raise DataError(f"{file}: annotation {number} is of image {image}, which is none of its images")
        if category not in labels:
            raise DataError(f"{file}: annotation {number} is of category {category}, which is none of its own")
        if len(one["bbox"]) != 4 or not all(isinstance(side, int | float) for side in one["bbox"]):
            raise DataError(f"{file}: annotation {number}: bbox={one['bbox']} must be x, y, width, height")
        found[image].append((number, labels[category], one["bbox"], bool(one["iscrowd"]), one["segmentation"]))
    return [found[image["id"]] for image in images]
