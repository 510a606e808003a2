"""Miniature sets as their owners publish them, made of shapes: iNaturalist and Flowers-102."""

import hashlib
import json

import numpy as np
from PIL import Image
from scipy.io import savemat

from ccmim_fast.data.made.shapes import ShapesSource

SIDE = 32


def shapes(seed, count, classes, cache=None):
    return ShapesSource(seed, count, (SIDE, SIDE), classes, cache_dir=cache and str(cache))


def make_inaturalist(root, train=12, val=6, classes=3, year=2018, cache=None):
    """`train{year}.json`, `val{year}.json` and the images of both below `train_val{year}`; categories are 3, 10, 17."""
    for seed, (part, count) in enumerate((("train", train), ("val", val))):
        source = shapes(seed, count, classes, cache)
        images, annotations = [], []
        for number in range(count):
            category = 3 + 7 * int(source.labels_N[number])
            name = f"train_val{year}/Plantae/{category}/{part}{number:04d}.png"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.decode(number)).save(root / name)
            images.append({"id": 1000 * seed + number, "file_name": name, "width": SIDE, "height": SIDE})
            annotations.append({"id": number, "image_id": 1000 * seed + number, "category_id": category})
        categories = [
            {"id": 3 + 7 * label, "name": f"{part} {label}", "supercategory": "Plantae"} for label in range(classes)
        ]
        # In an order of no meaning, as theirs.
        said = {"images": images[::-1], "annotations": annotations, "categories": categories[::-1]}
        (root / f"{part}{year}.json").write_text(json.dumps(said))
    return root


def make_flowers(root, train=12, test=6, classes=3, cache=None):
    """`jpg/`, `imagelabels.mat` and `setid.mat`: odd numbers are tested on as long as there are enough of them."""
    (root / "jpg").mkdir(parents=True)
    sources = [shapes(0, train, classes, cache), shapes(1, test, classes, cache)]
    numbers = [2 * n + 1 for n in range(test)]
    trained = [n for n in range(1, train + test + 1) if n not in numbers]
    labels = np.zeros((1, train + test), dtype=np.uint8)
    for source, of_these in zip(sources, (trained, numbers), strict=True):
        for at, number in enumerate(of_these):
            Image.fromarray(source.decode(at)).save(root / f"jpg/image_{number:05d}.jpg", quality=95, subsampling=0)
            labels[0, number - 1] = source.labels_N[at] + 1
    parts = {"trnid": trained[::2], "valid": trained[1::2], "tstid": numbers[::-1]}
    save_arrays(root / "imagelabels.mat", {"labels": labels})
    save_arrays(root / "setid.mat", {name: np.array([part], dtype=np.uint16) for name, part in parts.items()})
    return root


def save_arrays(path, arrays):
    """Write a MATLAB file, and its hash into the list that tells that its owner made it."""
    savemat(path, arrays)
    with open(path.parent / "MD5SUMS", "a") as sums:
        sums.write(f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n")
