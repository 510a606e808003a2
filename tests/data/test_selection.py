"""One rule for folders, URLs and tars: which names are samples, of which class, and what is left out."""

import re
from pathlib import Path

import pytest

from ccmim_fast.data.index.endings import COMPANIONS, CONTAINERS, FORMATS, IMAGES, UNREAD
from ccmim_fast.data.index.left_out import LOST, MEANT, OTHER, Notes
from ccmim_fast.data.index.selection import folder_labels, keys_of, samples, select


def selected(names, channels=3, image_key="", images=()):
    """Return what is taken, and (count, kind) by the first words of the reason."""
    notes = Notes()
    pictures, containers = select(names, channels, image_key, notes, lambda name: name in images)
    return pictures + containers, {note.reason.split(";")[0].split(":")[0]: (note.count, note.kind) for note in notes}


def test_no_ending_has_two_meanings():
    every = [*IMAGES, *CONTAINERS, *UNREAD, *COMPANIONS]
    assert len(every) == len({*every})
    assert all(ending == ending.lower() and ending[0] == "." for ending in every)
    assert {".jpg", ".jpe", ".jfif", ".j2k", ".pbm", ".pnm", ".dib"} <= {*IMAGES}
    assert [kind.name for kind in FORMATS][:2] == ["JPEG", "PNG"]  # the order in which a sample's image is chosen


def test_the_page_lists_the_endings_in_their_order():
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    rows = re.findall(r"^\| ([A-Z0-9]+) \| ((?:`\.\w+` ?)+) \|", page, re.M)
    assert rows == [(kind.name, " ".join(f"`{ending}`" for ending in kind.endings)) for kind in FORMATS]


@pytest.mark.parametrize("name", ["a.JPG", "a.JPE", "a.jfif", "b/c.Tiff", "a.j2k", "a.pbm", "x y.PNM", "a.b-c.jpeg"])
def test_endings_of_images_in_any_case(name):
    assert selected([name]) == ([name], {})


def test_what_is_none_of_an_images_endings():
    names = ["a.jpg", "b.heic", "c.tar.gz", "d.NEF", "e", "f.jpg_large", "README.md", "labels.csv", "g.xyz"]
    taken, reasons = selected(names, images=("e", "f.jpg_large"))
    assert taken == ["a.jpg"]
    assert reasons == {
        "a format that is not read": (3, LOST),
        "an image whose name ends in none of an image's endings": (2, LOST),
        "an ending of no image": (2, OTHER),
        "an unknown ending": (1, MEANT),
    }
    assert selected(["a.npy", "b.png"], channels=5)[0] == ["a.npy"]


@pytest.mark.parametrize("name", [".a.jpg", "b/._a.jpg", ".cache/a.jpg", "b/.ipynb_checkpoints/a.jpg", "./.x/a.jpg"])
def test_names_with_a_dot_are_left_out_and_told(name):
    assert selected(["./b/a.jpg", name]) == (["./b/a.jpg"], {"a name that begins with a dot": (1, MEANT)})


@pytest.mark.parametrize(
    ("names", "taken", "reasons"),
    [
        (["train/a/1.jpg", "val/a/2.jpg", "test/3.jpg"], ["train/a/1.jpg"], {"held out": (2, MEANT)}),
        (["Training/1.jpg", "Validation/2.jpg"], ["Training/1.jpg"], {"held out": (1, MEANT)}),
        (
            ["train/1.jpg", "dev/2.jpg", "more/3.jpg", "4.jpg"],
            ["train/1.jpg"],
            {"held out": (1, MEANT), "beside the training part of the set, in none of its parts": (2, LOST)},
        ),
        (["train/1.jpg", "plane/2.jpg"], ["train/1.jpg", "plane/2.jpg"], {}),  # a class of vehicles
        (["a/train/1.jpg", "a/val/2.jpg"], ["a/train/1.jpg"], {"held out": (1, MEANT)}),  # in the folder of all
        (["a/train/1.jpg", "b/val/2.jpg"], ["a/train/1.jpg", "b/val/2.jpg"], {}),
        (["train2017/1.jpg", "val2017/2.jpg", "test_images/3.jpg"], ["train2017/1.jpg"], {"held out": (2, MEANT)}),
        (["I_img_train/a/1.jpg", "I_img_val/2.jpg"], ["I_img_train/a/1.jpg"], {"held out": (1, MEANT)}),
        (["bullet_train/1.jpg", "test_tube/2.jpg"], ["bullet_train/1.jpg", "test_tube/2.jpg"], {}),
        (["mnist_train.parquet", "mnist_test.parquet"], ["mnist_train.parquet"], {"held out": (1, MEANT)}),
        (["x-train-01.tar", "x-val-01.tar"], ["x-train-01.tar"], {"held out": (1, MEANT)}),
        (["val/1.jpg"], ["val/1.jpg"], {}),
        (["train-00.parquet", "test-00.parquet"], ["train-00.parquet"], {"held out": (1, MEANT)}),
        (["d/train.tar", "d/val_0.tar", "val/0.tar"], ["d/train.tar"], {"held out": (2, MEANT)}),
        (["trains.tar", "validity.tar"], ["trains.tar", "validity.tar"], {}),
    ],
)
def test_the_training_part_alone_is_taken_where_others_lie_beside_it(names, taken, reasons):
    assert selected(names) == (taken, reasons)


def test_containers_beside_images():
    """The set is what there is more of; what is left out counts."""
    images, tars = [f"a/{i}.jpg" for i in range(3)], ["0.tar", "b/1.TAR", "2.parquet", "3.arrow"]
    assert selected(images + tars[:2]) == (images, {"a tar or table beside more images than tars": (2, LOST)})
    assert selected(images + tars) == (
        tars,
        {"an image beside tars or tables, which are read instead of it": (3, LOST)},
    )


@pytest.mark.parametrize(
    ("members", "key", "taken", "lost"),
    [
        (["0.jpg", "0.seg.png", "0.depth.png"], "", ["0.jpg"], 0),
        (["0.png", "0.jpg", "1.png", "1.webp"], "", ["0.jpg", "1.png"], 0),
        (["0.JPG", "0.Seg.png"], "", ["0.JPG"], 0),
        (["0.seg.png", "1.jpg"], "", ["1.jpg"], 1),
        (["0.thumb.jpg", "0.jpg"], "", ["0.jpg"], 0),
        (["a.1.jpg", "a.2.jpg", "b.3.5.png"], "", ["a.1.jpg", "a.2.jpg", "b.3.5.png"], 0),  # dots of ordinary names
        (["a.jpg", "a.1.jpg", "my.photo.jpg"], "", ["a.jpg", "a.1.jpg", "my.photo.jpg"], 0),
        (["d/0.jpg", "e/0.jpg", "e/0.mask.png"], "", ["d/0.jpg", "e/0.jpg"], 0),  # a key has its folder
        (["0.jpg", "0.seg.png", "1.jpg"], "seg.png", ["0.seg.png"], 1),
        (["0.jpg", "0.png", "1.png"], "png; .JPG", ["0.png", "1.png"], 0),
        (["0.jpg", "1.jpeg"], "jpg", ["0.jpg"], 1),
    ],
)
def test_one_key_of_a_tar_is_one_sample(members, key, taken, lost):
    notes = Notes()
    assert samples(members, key, notes, one_per_key=True) == taken
    assert sum(note.count for note in notes if note.kind == LOST) == lost
    assert sum(note.count for note in notes) == len(members) - len(taken)


def test_in_a_folder_each_image_is_a_sample_but_annotations_beside_one():
    names = ["0.jpg", "0.seg.png", "0.png", "0.edited.jpg", "1.labels.png"]
    assert samples(names, "", Notes(), one_per_key=False) == ["0.jpg", "0.png", "0.edited.jpg"]
    assert samples(names, "seg.png", Notes(), one_per_key=False) == ["0.seg.png"]
    assert keys_of(" .jpg,PNG;") == ["jpg", "png"]


@pytest.mark.parametrize(
    ("names", "folders", "classes", "labels"),
    [
        (["b/1", "a/2", "3"], ["a", "b", "c", "c/d"], ("a", "b", "c"), [1, 0, -1]),
        (["1", "2"], ["a"], (), [-1, -1]),
        (["train/b/1", "train/a/2"], ["train", "train/a", "train/b", "train/c"], ("a", "b", "c"), [1, 0]),
        (["train/1", "train/2"], ["train"], (), [-1, -1]),
        (
            ["a/train2017/c/1", "a/train2017/d/2"],
            ["a", "a/train2017/e", "f/g/h"],
            ("c", "d", "e"),
            [0, 1],
        ),
        (["a/b/1", "a/b/2"], ["a", "a/b"], ("a",), [0, 0]),
        (["train/a/1", "plane/2"], [], ("plane", "train"), [1, 0]),
        (["./a/1", "../b/2", "/c/3", "a/../d/4"], [], ("a", "d"), [0, -1, -1, 1]),
        ([], ["a"], (), []),
    ],
)
def test_classes_are_the_first_folders(names, folders, classes, labels):
    assert folder_labels(names, folders) == (classes, labels)
