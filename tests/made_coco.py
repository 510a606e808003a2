"""A miniature of COCO's folder: four images a part, three categories, polygons, a crowd, images without objects."""

import json

import numpy as np
from PIL import Image

SIZES = ((40, 60), (60, 40), (48, 48), (50, 64))  # height, width
CATEGORIES = [{"id": number, "name": name} for number, name in ((90, "toothbrush"), (1, "person"), (7, "train"))]


def polygon(x0, y0, x1, y1):
    return [float(value) for value in (x0, y0, x1, y0, x1, y1, x0, y1)]


def runs(mask_HW):
    """Lengths of the runs down the columns, of zeros first."""
    flat = np.concatenate([[0], mask_HW.flatten("F").astype(int), [-1]])
    ends = np.flatnonzero(np.diff(flat[1:])) + 1
    lengths = np.diff(np.concatenate([[0], ends]))
    return [0, *lengths.tolist()] if flat[1] else lengths.tolist()


def annotation(number, image, category, box, segmentation=None, crowd=0):
    x0, y0, x1, y1 = box
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
        "iscrowd": crowd,
        "segmentation": segmentation or [polygon(*box)],
    }


def content():
    """What the file of annotations says: image 11 has two objects and a crowd, 12 one of two polygons, 13 a crowd alone
    and a box too thin, 14 nothing."""
    crowd_HW = np.zeros(SIZES[0], dtype=bool)
    crowd_HW[0:5, 50:60] = True
    dense_HW = np.ones(SIZES[2], dtype=bool)
    names = [{"id": 11 + i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(SIZES)]
    return {
        "images": names[::-1],
        "categories": list(CATEGORIES),
        "annotations": [
            annotation(1, 11, 90, (2, 1, 22, 31)),
            annotation(2, 11, 1, (30, 10, 50, 20)),
            annotation(3, 11, 1, (50, 0, 60, 5), {"counts": runs(crowd_HW), "size": list(SIZES[0])}, crowd=1),
            annotation(4, 12, 7, (5, 5, 35, 50), [polygon(5, 5, 15, 50), polygon(20, 5, 35, 50)]),
            annotation(5, 13, 1, (0, 0, 48, 48), {"counts": runs(dense_HW), "size": list(SIZES[2])}, crowd=1),
            annotation(6, 13, 1, (8, 8, 9, 40)),
        ],
    }


def write_coco(root, change=lambda said: None):
    """Both parts below `root`, alike; each object is painted in the colour of its category.

    `change` spoils what the files of annotations say.
    """
    (root / "annotations").mkdir()
    for part in ("train2017", "val2017"):
        spoilt, said = content(), content()
        change(spoilt)
        (root / part).mkdir()
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(spoilt))
        for image in said["images"]:
            pixels_HWC = np.full((image["height"], image["width"], 3), 90, dtype=np.uint8)
            for one in said["annotations"]:
                if one["image_id"] == image["id"] and not one["iscrowd"]:
                    x, y, width, height = one["bbox"]
                    pixels_HWC[y : y + height, x : x + width] = (one["category_id"] * 2, 200, 40)
            Image.fromarray(pixels_HWC).save(root / part / image["file_name"])
    return root
