"""Images whose objects are known, with box, class and mask of each: COCO as its owners publish it, or shapes.

To a `Source` they add `sample(index)`: the pixels and the objects of one image, or DataError naming the image.
`excluded_X` are the images without an object to train on.
"""

# N objects, S samples, X excluded samples, H height, W width, C channels

import contextlib
import hashlib
import json
import os
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ccmim_fast.data.index.decode import BYTE, decode
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.source import NOTHING_EXCLUDED
from ccmim_fast.errors import DataError, one_line

LAYOUT = (
    "data.root holds annotations/instances_train2017.json and instances_val2017.json beside train2017/ and val2017/, "
    "or these without years: train and test"
)
_PARTS = ("train2017", "val2017"), ("train", "test")
# What is read of the file: the lists, and what each row of them must have.
_ROWS = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "categories": {"id": int, "name": str},
    "annotations": {
        **{"id": int, "image_id": int, "category_id": int, "bbox": list, "iscrowd": int},
        "segmentation": (list, dict),
    },
}
_FAR = 65536  # pixels: sides of an image, and places of its objects, beyond which a number is no such thing
_LARGEST = 4 * 2**30  # bytes of a file; COCO's largest has half a gigabyte
_MOST = 2**32  # bytes of the masks of one image's objects, one a pixel
_LEAST_SIDE = 1  # pixels; an image whose boxes are all as narrow is not trained on (torchvision's reference)


class Instances(NamedTuple):
    """This tuple describes the objects of an image."""

    boxes_N4: np.ndarray  # float32 x0, y0, x1, y1 in pixels, the last two exclusive
    labels_N: np.ndarray  # int64 indices into the source's `class_names`
    masks_NHW: np.ndarray  # bool
    crowd_N: np.ndarray  # bool, regions of many objects: no one trains on them, and what is found there is no mistake


class ShapesInstances(ShapesSource):
    """Images made by code, whose one object is known to the pixel."""

    def sample(self, index: int) -> tuple[np.ndarray, Instances]:
        return self.decode(index), self.instances(index)

    def instances(self, index: int) -> Instances:
        y0, x0, y1, x1 = self.box(index)
        mask_HW = np.array(self.mask(index))  # the cache is read-only, which torch does not like
        box_14 = np.array([[x0, y0, x1, y1]], dtype=np.float32)
        return Instances(box_14, self.labels_N[index : index + 1], mask_HW[None], np.zeros(1, dtype=bool))


def parts_of(root: str) -> tuple[str, str]:
    """Return the names of the parts to train on and to test on: COCO's, or without years if only such are there."""
    found = [parts for parts in _PARTS if Path(root, "annotations", f"instances_{parts[0]}.json").exists()]
    return [*found, *_PARTS][0]


class CocoSource:
    """One of COCO's two parts; as much of a `Source` as evaluations ask for.

    `root` is a folder of the layout above, `part` is one of `parts_of(root)`. With `train`, images without an object
    to train on are excluded. Classes are the categories by their ids, or `class_names`, which has the same names.
    Raises DataError: a file that is missing, damaged, or speaks of what is not there.
    """

    channels, dtype = 3, BYTE
    labels_N = None  # an image has many

    def __init__(self, root: str, part: str, train: bool, class_names: tuple[str, ...] = ()) -> None:
        file, self._folder = Path(root, "annotations", f"instances_{part}.json"), Path(root, part)
        text = _read(file, f"; {LAYOUT}")
        content = _parse(text, file)
        images = sorted(content["images"], key=lambda image: image["id"])
        categories = sorted(content["categories"], key=lambda category: category["id"])
        if not self._folder.is_dir():
            raise DataError(f"{self._folder}: no such folder; {LAYOUT}")
        if missing := _missing(self._folder, {image["file_name"] for image in images}):
            raise DataError(f"{self._folder}: lacks {len(missing)} of the images in {file}, such as {min(missing)}")
        names = tuple(category["name"] for category in categories)
        self.class_names = class_names or names
        if odd := set(names) ^ set(self.class_names):
            raise DataError(f"{file}: category {min(odd)!r:.60} is in one of the two files alone")
        labels = {category["id"]: self.class_names.index(category["name"]) for category in categories}
        self.sizes_N2 = np.array([(image["height"], image["width"]) for image in images], dtype=np.int32).reshape(-1, 2)
        self._names = np.array([image["file_name"] for image in images])
        of_images = _by_image(content["annotations"], images, labels, file)
        least = _LEAST_SIDE if train else -np.inf
        usable = [any(not crowd and min(box[2:]) > least for _, _, box, crowd, _ in objects) for objects in of_images]
        if not any(usable):
            raise DataError(f"{file}: no image of it has an object to {'train' if train else 'test'} on")
        without_X = np.flatnonzero(~np.array(usable))
        self.excluded_X = without_X if train else NOTHING_EXCLUDED
        self.left_out = {"without an object to train on": self.excluded_X}
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

    def sample(self, index: int) -> tuple[np.ndarray, Instances]:
        return self.decode(index), self.instances(index)

    def instances(self, index: int) -> Instances:
        objects = json.loads(self._objects[self._ends[index] : self._ends[index + 1]].tobytes())
        height, width = (int(side) for side in self.sizes_N2[index])
        if len(objects) * height * width > _MOST:
            raise DataError(f"{self.name(index)}: {len(objects)} objects of {height} x {width} pixels are too many")
        masks_NHW = np.zeros((len(objects), height, width), dtype=bool)
        for mask_HW, (number, *_, segmentation) in zip(masks_NHW, objects):
            try:
                mask_HW[:] = mask_of(segmentation, height, width)
            except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
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

    Raises ValueError or TypeError: a polygon of fewer than three points, or one that is far outside; runs of another
    size, or that do not cover it.
    """
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"is of {segmentation['size']} pixels, its image of {[height, width]}")
        counts = segmentation["counts"]
        counts = counts if isinstance(counts, list) else runs_in(counts)
        if not all(isinstance(count, int) and count >= 0 for count in counts) or sum(counts) != height * width:
            raise ValueError(f"its runs do not cover the {height * width} pixels of its image")
        return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
    if not segmentation or any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
        raise ValueError("a polygon has an x and a y for each of three points or more")
    if not all(map(_is_place, chain.from_iterable(segmentation))):
        raise ValueError(f"a polygon's x or y is no number within {_FAR} pixels")
    from faster_coco_eval import mask

    return mask.decode(mask.merge(mask.frPyObjects(segmentation, height, width))).astype(bool)


def runs_in(text: str | bytes) -> list[int]:
    """Return the runs that COCO's compressed form holds: six bits a character, from the third on differences.

    The library would write beyond its memory for text that covers more than its image. Raises ValueError: no such text.
    """
    runs, value, shift = [], 0, 0
    for character in text.encode("ascii") if isinstance(text, str) else text:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("its runs are no text of COCO's")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << shift - 4  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    if shift:
        raise ValueError("its runs end within one")
    return runs


def _is_place(number: Any) -> bool:
    """Tell whether this is a number of pixels that may be meant."""
    return isinstance(number, int | float) and abs(number) <= _FAR  # not so of nan


def _missing(folder: Path, names: set[str]) -> set[str]:
    """Return which of the files are not in a folder, or in one of its own folders; none that leads out of it is."""
    there = set()
    for inner in {os.path.dirname(name) for name in names}:
        if not os.path.isabs(inner) and ".." not in inner.split("/"):
            with contextlib.suppress(OSError, ValueError):  # ValueError: a zero byte in the name
                there |= {os.path.join(inner, name) for name in os.listdir(folder / inner)}
    return names - there


def _read(file: Path, advice: str = "") -> bytes:
    try:
        if file.exists() and not file.is_file():
            raise DataError(f"{file}: is no file{advice}")  # opening a FIFO would wait
        if file.stat().st_size > _LARGEST:
            raise DataError(f"{file}: larger than {_LARGEST / 1e9:.0f} GB{advice}")
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
    for image in content["images"]:
        height, width = image["height"], image["width"]
        if not (0 < height <= _FAR and 0 < width <= _FAR):
            raise DataError(f"{file}: image {image['id']} is of {height} x {width} pixels")
    for name, key in (("images", "id"), ("categories", "id"), ("categories", "name"), ("annotations", "id")):
        [(value, count)] = Counter(row[key] for row in content[name]).most_common(1) or [("", 0)]
        if count > 1:
            raise DataError(f"{file}: {name}: {count} of them have the {key} {value!r:.60}")
    return content


def _by_image(annotations: list, images: list, labels: dict[int, int], file: Path) -> list[list[tuple]]:
    """Return the objects of each image: number, label, box (x, y, width, height), crowd, segmentation.

    `labels` are by the category's id.
    """
    found = defaultdict(list, {image["id"]: [] for image in images})
    for one in annotations:
        number, image, category = one["id"], one["image_id"], one["category_id"]
        if image not in found:
            raise DataError(f"{file}: annotation {number} is of image {image}, which is none of its images")
        if category not in labels:
            raise DataError(f"{file}: annotation {number} is of category {category}, which is none of its own")
        if len(one["bbox"]) != 4 or not all(map(_is_place, one["bbox"])) or min(one["bbox"][2:]) < 0:
            must = f"x, y, width, height, each within {_FAR} pixels"
            raise DataError(f"{file}: annotation {number}: bbox={one['bbox']!r:.100} must be {must}")
        found[image].append((number, labels[category], one["bbox"], bool(one["iscrowd"]), one["segmentation"]))
    return [found[image["id"]] for image in images]
