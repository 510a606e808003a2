"""COCO's files, as `ccmim eval detection` reads them."""

import json
import shutil

import numpy as np
import pytest
from made_coco import SIZES, runs, write_coco
from PIL import Image

from ccmim_fast.errors import DataError
from ccmim_fast.evaluation.detection.instances import CocoSource, mask_of

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
    "short": ({"counts": [5, 5], "size": [40, 60]}, "its runs cover 10 pixels of 2400"),
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
