"""COCO's files, as `ccmim eval detection` reads them."""

import json
import os
import shutil

import numpy as np
import pytest
from made_coco import SIZES, content, runs, write_coco
from PIL import Image

from ccmim_fast.errors import DataError
from ccmim_fast.evaluation.detection import instances
from ccmim_fast.evaluation.detection.instances import CocoSource, mask_of, parts_of, runs_in

pytest.importorskip("faster_coco_eval")


@pytest.fixture
def root(tmp_path):
    return write_coco(tmp_path)


def test_objects_are_those_of_the_file(root):
    source = CocoSource(str(root), "train2017", train=True)
    assert source.class_names == ("person", "train", "toothbrush")  # in the order of their numbers
    np.testing.assert_array_equal(source.sizes_N2, SIZES)
    found = source.instances(0)
    np.testing.assert_array_equal(found.boxes_N4, [[2, 1, 22, 31], [30, 10, 50, 20], [50, 0, 60, 5]])
    assert found.labels_N.tolist() == [2, 0, 0]
    assert found.crowd_N.tolist() == [False, False, True]
    for mask_HW, (x0, y0, x1, y1) in zip(found.masks_NHW, found.boxes_N4.astype(int)):
        expected_HW = np.zeros(SIZES[0], dtype=bool)
        expected_HW[y0:y1, x0:x1] = True
        np.testing.assert_array_equal(mask_HW, expected_HW)


def test_an_object_of_two_polygons_has_a_gap(root):
    [mask_HW] = CocoSource(str(root), "val2017", train=False).instances(1).masks_NHW
    assert mask_HW[5:50, 5:15].all()
    assert mask_HW[5:50, 20:35].all()
    assert mask_HW.sum() == 45 * 25


def test_images_without_an_object_are_tested_on_but_not_trained_on(root):
    """A crowd, a box a pixel wide, nothing at all."""
    train, test = CocoSource(str(root), "train2017", train=True), CocoSource(str(root), "val2017", train=False)
    assert (len(train), train.excluded_X.tolist()) == (4, [2, 3])
    assert (len(test), test.excluded_X.tolist()) == (4, [])
    nothing = test.instances(3)
    assert nothing.boxes_N4.shape == (0, 4)
    assert nothing.masks_NHW.shape == (0, *SIZES[3])


@pytest.mark.parametrize("crowds", [True, False])
def test_nothing_to_test_on_is_told_at_opening(tmp_path, crowds):
    """No objects, or crowds alone: there would be no average precision."""

    def change(said):
        said["annotations"] = [one for one in said["annotations"] if crowds and one["iscrowd"]]

    root = write_coco(tmp_path, change)
    with pytest.raises(DataError, match=r"instances_val2017\.json: no image of it has an object to test on\Z"):
        CocoSource(str(root), "val2017", train=False)


def test_a_thin_box_alone_is_tested_on(tmp_path):
    root = write_coco(tmp_path, lambda said: said.update(annotations=said["annotations"][-1:]))
    assert len(CocoSource(str(root), "val2017", train=False)) == 4


def test_runs_may_be_a_list_or_text():
    from faster_coco_eval import mask

    mask_HW = np.random.default_rng(0).random((13, 9)) < 0.4
    text = mask.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    np.testing.assert_array_equal(mask_of({"counts": runs(mask_HW), "size": [13, 9]}, 13, 9), mask_HW)
    np.testing.assert_array_equal(mask_of({"counts": text["counts"].decode(), "size": [13, 9]}, 13, 9), mask_HW)


def test_a_box_beyond_the_image_ends_at_its_edge(tmp_path):
    write_coco(tmp_path, lambda said: said["annotations"][0].update(bbox=[-3, 1, 90, 30]))
    source = CocoSource(str(tmp_path), "train2017", train=True)
    assert source.instances(0).boxes_N4[0].tolist() == [0, 1, 60, 31]


@pytest.mark.parametrize("seed", range(8))
def test_text_holds_the_runs_that_the_library_wrote(seed):
    """Long runs, short ones, shrinking ones; none and all of an image."""
    from faster_coco_eval import mask

    draws = np.random.default_rng(seed)
    mask_HW = np.kron(draws.random((7, 5)) < seed / 7, np.ones((1 + 9 * seed, 3))).astype(bool)
    text = mask.encode(np.asfortranarray(mask_HW.astype(np.uint8)))["counts"]
    assert runs_in(text) == runs_in(text.decode()) == runs(mask_HW)


def test_categories_in_another_order_of_ids_are_known_by_their_names(tmp_path):
    def change(said):
        number = {1: 90, 90: 1, 7: 7}
        said["categories"] = [one | {"id": number[one["id"]]} for one in said["categories"]]
        for one in said["annotations"]:
            one["category_id"] = number[one["category_id"]]

    write_coco(tmp_path, change)
    (tmp_path / FILE).write_text(json.dumps(content()))
    train = CocoSource(str(tmp_path), "train2017", train=True)
    test = CocoSource(str(tmp_path), "val2017", train=False, class_names=train.class_names)
    assert test.class_names == train.class_names
    assert test.instances(0).labels_N.tolist() == train.instances(0).labels_N.tolist()
    with pytest.raises(DataError, match="category 'cat' is in one of the two files alone"):
        CocoSource(str(tmp_path), "val2017", train=False, class_names=("cat", "person", "train", "toothbrush"))


def test_too_many_objects_are_told_before_their_masks_take_memory(root, monkeypatch):
    monkeypatch.setattr(instances, "_MOST", 40 * 60 * 3 - 1)
    source = CocoSource(str(root), "train2017", train=True)
    with pytest.raises(DataError, match=r"0\.png: 3 objects of 40 x 60 pixels are too many"):
        source.sample(0)
    assert len(source.sample(1)[1].labels_N) == 1


@pytest.mark.parametrize("place", ["annotations/instances_train2017.json", "train2017/0.png"])
def test_nobody_waits_for_a_fifo(root, place):
    (root / place).unlink()
    os.mkfifo(root / place)
    with pytest.raises(DataError, match=f"{place}: is no file"):
        CocoSource(str(root), "train2017", train=True).decode(0)


def test_a_file_beyond_reason_is_not_read(root, monkeypatch):
    monkeypatch.setattr(instances, "_LARGEST", 1000)
    with pytest.raises(DataError, match=r"train2017\.json: larger than 0 GB; data.root holds"):
        CocoSource(str(root), "train2017", train=True)


FILE = "annotations/instances_train2017.json"
MISTAKES = {
    "no file": (lambda root: (root / FILE).unlink(), "No such file or directory; data.root holds annotations/inst"),
    "no folder": (lambda root: shutil.rmtree(root / "train2017"), "train2017: no such folder; data.root holds annot"),
    "no image": (lambda root: (root / "train2017" / "1.png").unlink(), "lacks 1 of the images in .*, such as 1.png"),
    "cut off": (lambda root: (root / FILE).write_bytes((root / FILE).read_bytes()[:-9]), "train2017.json: damaged: "),
    "not text": (lambda root: (root / FILE).write_bytes(b"\xff\xfe\x00"), "train2017.json: damaged: "),
    "captions": (lambda root: (root / FILE).write_text('{"images": []}'), "no list of categories in it"),
    "a list": (lambda root: (root / FILE).write_text("[1]"), "no list of images in it"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_another_layout_is_told_in_one_line(root, mistake):
    spoil, words = MISTAKES[mistake]
    spoil(root)
    with pytest.raises(DataError, match=words) as caught:
        CocoSource(str(root), "train2017", train=True)
    assert "\n" not in str(caught.value)


WRONG = {
    "image": (lambda c: c["annotations"][3].update(image_id=99), "annotation 4 is of image 99, which is none of its"),
    "category": (lambda c: c["annotations"][0].update(category_id=2), "annotation 1 is of category 2, which is none"),
    "box": (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"annotation 1: bbox=\[1, 2, 3\] must be x, y,"),
    "key": (lambda c: c["annotations"][1].pop("iscrowd"), "annotations: iscrowd of 2 is missing"),
    "kind": (lambda c: c["images"][0].update(height="50"), "images: height of 14 is '50'"),
    "text": (lambda c: c["annotations"][0].update(bbox=[1, 2, "3", 4]), r"annotation 1: bbox=\[1, 2, '3', 4\] must"),
    "minus": (
        lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]),
        r"bbox=\[1, 2, -3, 4\] must be x, y, width, height",
    ),
    "nan": (lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "each within 65536 pixels"),
    "far": (lambda c: c["annotations"][0].update(bbox=[1, 2, 1e300, 4]), "each within 65536 pixels"),
    "no pixels": (lambda c: c["images"][0].update(height=0), "image 14 is of 0 x 64 pixels"),
    "less": (lambda c: c["images"][0].update(width=-64), "image 14 is of 50 x -64 pixels"),
    "more": (lambda c: c["images"][0].update(height=10**30), "image 14 is of 10+ x 64 pixels"),
    "images": (lambda c: c["images"][0].update(id=11), "images: 2 of them have the id 11"),
    "ids": (lambda c: c["annotations"][1].update(id=1), "annotations: 2 of them have the id 1"),
    "names": (
        lambda c: c.update(categories=[{"id": 1, "name": "a"}, {"id": 7, "name": "a"}]),
        "2 of them have the name 'a'",
    ),
    "above": (
        lambda c: c["images"][0].update(file_name="../0.png"),
        r"lacks 1 of the images in .*, such as \.\./0\.png",
    ),
    "nothing": (lambda c: c["annotations"].clear(), "no image of it has an object to train on"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_annotations_that_do_not_go_together_are_told_in_one_line(tmp_path, mistake):
    change, words = WRONG[mistake]
    with pytest.raises(DataError, match=words):
        CocoSource(str(write_coco(tmp_path, change)), "train2017", train=True)


BROKEN = {
    "two points": ([[0.0, 0.0, 1.0, 1.0]], "three points or more"),
    "odd": ([[0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0]], "three points or more"),
    "none": ([[]], "three points or more"),
    "size": ({"counts": [2400], "size": [60, 40]}, r"is of \[60, 40\] pixels, its image of \[40, 60\]"),
    "short": ({"counts": [5, 5], "size": [40, 60]}, "its runs do not cover the 2400 pixels of its image"),
    "below zero": ({"counts": [-100, 2500], "size": [40, 60]}, "do not cover"),
    "no number": ({"counts": [2400.0], "size": [40, 60]}, "do not cover"),
    "long text": ({"counts": "ooooooo0", "size": [40, 60]}, "do not cover"),
    "endless text": ({"counts": "o" * 99, "size": [40, 60]}, "no text of COCO's"),
    "other text": ({"counts": "\u00e9 !", "size": [40, 60]}, ""),
    "text that ends early": ({"counts": "oo", "size": [40, 60]}, "end within one"),
    "no counts": ({"counts": None, "size": [40, 60]}, ""),
    "nowhere": ([[0.0, 0.0, 1e30, 1.0, 2.0, 2.0]], "no number within 65536 pixels"),
    "not a number": ([[0.0, 0.0, float("nan"), 1.0, 2.0, 2.0]], "no number within 65536 pixels"),
    "words": ([["0", "0", "9", "0", "9", "9"]], "no number within 65536 pixels"),
    "a number": ([3], ""),
}


@pytest.mark.parametrize("which", BROKEN)
def test_a_broken_segmentation_names_image_and_annotation(tmp_path, which):
    segmentation, words = BROKEN[which]
    write_coco(tmp_path, lambda said: said["annotations"][0].update(segmentation=segmentation))
    source = CocoSource(str(tmp_path), "train2017", train=True)
    with pytest.raises(DataError, match=rf"0\.png: segmentation of annotation 1: .*{words}"):
        source.instances(0)


def test_an_image_of_another_size_than_its_annotations(root):
    Image.new("RGB", (30, 20)).save(root / "train2017" / "0.png")
    with pytest.raises(DataError, match=r"0\.png: 20 x 30 pixels; its annotations are of 40 x 60"):
        CocoSource(str(root), "train2017", train=True).decode(0)


def test_the_fingerprint_is_that_of_the_annotations(root):
    before = CocoSource(str(root), "train2017", train=True).fingerprint
    file = root / FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"info": {}}))
    assert CocoSource(str(root), "train2017", train=True).fingerprint != before


def test_images_lie_in_folders_of_their_part_and_nowhere_else(tmp_path):
    """A part without a year is read where COCO's own is not there."""
    assert parts_of(str(write_coco(tmp_path))) == ("train2017", "val2017")
    (tmp_path / "annotations/instances_train2017.json").rename(tmp_path / "annotations/instances_train.json")
    (tmp_path / "train2017").rename(tmp_path / "train")
    assert parts_of(str(tmp_path)) == ("train", "test")
    file, train = tmp_path / "annotations/instances_train.json", tmp_path / "train"
    said = json.loads(file.read_text())
    (train / "a").mkdir()
    (train / "0.png").rename(train / "a/0.png")
    names = ("a/0.png", "b/0.png", "../val2017/0.png", str(train / "1.png"))
    for name, is_there in zip(names, (True, False, False, False)):
        next(image for image in said["images"] if image["id"] == 11)["file_name"] = name
        file.write_text(json.dumps(said))
        if is_there:
            assert CocoSource(str(tmp_path), "train", train=True).sample(0)[0].shape == (40, 60, 3)
        else:
            with pytest.raises(DataError, match="lacks 1 of the images"):
                CocoSource(str(tmp_path), "train", train=True)
