"""Folders of ADE20K's layout, shapes with labels, and every way in which a folder can be wrong."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ccmim_fast.config.schema import DataConfig
from ccmim_fast.errors import DataError
from ccmim_fast.evaluation.images import Images, round_pixels_
from ccmim_fast.evaluation.segmentation.scenes import IGNORED, NAMES, folder_scenes, shape_scenes

HEADING = "Idx\tRatio\tTrain\tVal\tName\n"


def numbers_of(index):
    """What the annotation of image `index` of the miniature holds: 0 in its first column, then 1, 2 and 3."""
    numbers_HW = np.repeat(np.arange(24)[None] // 8 + 1, 20 + index, axis=0)
    numbers_HW[:, 0] = 0
    return numbers_HW.astype(np.uint8)


def test_images_and_labels_belong_together(miniature):
    train, test = folder_scenes(str(miniature))
    assert (len(train), len(test)) == (5, 3)
    assert train.class_names == test.class_names == ("wall", "sea, ocean", "bed")
    for scenes in (train, test):
        for index in range(len(scenes)):
            image_HWC, labels_HW = scenes.decode(index), scenes.labels(index)
            assert labels_HW.dtype == np.uint8
            assert image_HWC.shape == (*labels_HW.shape, 3)
            assert labels_HW.shape == (20 + index, 24) == tuple(scenes.sizes_N2[index])
            assert (labels_HW[:, 0] == IGNORED).all()
            assert np.array_equal(labels_HW[:, 1:], numbers_of(index)[:, 1:] - 1)
            # The very picture of these labels, but for what JPEG rounds at edges.
            assert np.abs(image_HWC[:, 4:8, 0] / 60 - 1 - labels_HW[:, 4:8]).max() < 0.1


def test_without_names_the_classes_are_counted(miniature):
    (miniature / NAMES).unlink()
    train, test = folder_scenes(str(miniature))
    assert train.class_names == test.class_names == ("1", "2", "3")


def test_images_below_folders_and_palettes(miniature):
    """As some sets sort their images; a palette's numbers are the labels, whatever its colours."""
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        (miniature / kind / "training" / "town").mkdir()
        for index in range(5):
            file = miniature / kind / "training" / f"ADE_training_{index}.{suffix}"
            file.rename(miniature / kind / "training" / "town" / file.name)
    palette = Image.fromarray(numbers_of(0), mode="P")
    palette.putpalette([7, 8, 9] * 256)
    palette.save(miniature / "annotations" / "training" / "town" / "ADE_training_0.png")
    train, _ = folder_scenes(str(miniature))
    assert np.array_equal(train.labels(0), numbers_of(0) - np.uint8(1))


def spoil(root, index, content):
    path = root / "annotations" / "training" / f"ADE_training_{index}.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        Image.fromarray(content).save(path)
    return path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.ones((7, 24), np.uint8), "7 x 24 pixels, and its image .*ADE_training_1.jpg has 21 x 24"),
        (np.full((21, 24), 4, np.uint8), r"label 4 must be in 0\.\.3, the number of classes"),
        (np.ones((21, 24, 3), np.uint8), "of mode RGB; it must be of one channel, gray or palette"),
        (np.full((21, 24), 257, np.uint16), r"label 257 must be in 0\.\.3, the number of classes"),
        (b"no image", "cannot be read"),
    ],
)
def test_wrong_annotations_are_named(miniature, content, words):
    path = spoil(miniature, 1, content)
    train, _ = folder_scenes(str(miniature))
    train.labels(0)
    with pytest.raises(DataError, match=words) as raised:
        train.labels(1)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_a_missing_annotation_is_named(miniature):
    path = miniature / "annotations" / "validation" / "ADE_validation_2.png"
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: no such file; it must be there for the image .*ADE_validation_2.jpg"):
        folder_scenes(str(miniature))


@pytest.mark.parametrize("folder", ["images/training", "images/validation", "annotations/validation"])
def test_another_layout_is_named(miniature, folder):
    (miniature / folder).rename(miniature / "elsewhere")
    with pytest.raises(DataError, match=rf"{folder}: no such folder; data.root must hold images/ and annotations/"):
        folder_scenes(str(miniature))


@pytest.mark.parametrize("rows", ["", "1\ta\n", "1\ta\n3\tb\n", "one\ta\ntwo\tb\n"])
def test_names_that_are_no_numbered_list_are_refused(miniature, rows):
    (miniature / NAMES).write_text(HEADING + rows)
    with pytest.raises(DataError, match=r"objectInfo150.txt: must number 2 to 255 classes from 1 on"):
        folder_scenes(str(miniature))


def test_a_single_class_is_refused(miniature):
    (miniature / NAMES).unlink()
    for index in range(5):
        spoil(miniature, index, np.minimum(numbers_of(index), 1))
    with pytest.raises(DataError, match=r"and 4 others: labels 0\.\.1; there must be 2 to 255 classes"):
        folder_scenes(str(miniature))


def test_shapes_are_labelled_by_their_masks():
    scenes = shape_scenes(DataConfig(source="shapes", image_size=(24, 40), samples=12, classes=4), 3)
    assert scenes.class_names == ("background", "disc", "square", "triangle", "ring")
    found = {tuple(np.unique(scenes.labels(index))) for index in range(12)}
    assert found == {(0, 1), (0, 2), (0, 3), (0, 4)}
    assert scenes.labels(0).shape == (24, 40) == scenes.decode(0).shape[:2]


def test_wide_pixels_are_rounded_aloud(miniature, capsys):
    for part, count in (("training", 5), ("validation", 3)):
        for index in range(count):
            file = miniature / "images" / part / f"ADE_{part}_{index}.jpg"
            np.save(file.with_suffix(".npy"), np.full((20 + index, 24, 3), 257 * 90 + 100, np.uint16))
            file.unlink()
    both = [Images(scenes, DataConfig()) for scenes in folder_scenes(str(miniature))]
    assert both[0].source.sample(0)[0].dtype == np.float32
    round_pixels_(both, SimpleNamespace(is_main=True))
    assert capsys.readouterr().out.count("pixels are rounded to 8 bits") == 1
    for images in both:
        image_HWC = images.source.sample(0)[0]
        assert image_HWC.dtype == images.source.dtype == np.uint8
        assert (image_HWC == 90).all()
