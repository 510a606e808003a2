"""iNaturalist and Flowers-102 in miniature: labels and splits as published; damaged files give one-line errors."""

import json
import os
import shutil

import numpy as np
import pytest
from made_fine_grained import make_flowers, make_inaturalist, save_arrays, shapes
from PIL import Image
from torchvision.datasets import Flowers102

from ccmim_fast.data.index import annotations
from ccmim_fast.data.index.annotations import flowers_origins, inaturalist_origins
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.errors import ConfigError, DataError


def pictures(source):
    """Return the pixels by (file's name, class)."""
    found = range(len(source))
    return {(os.path.basename(source.name(i)), source.class_names[source.labels_N[i]]): source.decode(i) for i in found}


@pytest.mark.parametrize("year", [2018, 2019])
def test_inaturalist(tmp_path, year):
    """Labels follow the categories, whatever the order and the names in the file; both splits agree on them."""
    make_inaturalist(tmp_path, year=year)
    train, val = (open_images(origin) for origin in inaturalist_origins(str(tmp_path)))
    assert train.class_names == val.class_names == ("03", "10", "17")
    assert (len(train), len(val)) == (12, 6)
    for source, seed, part in ((train, 0, "train"), (val, 1, "val")):
        made = shapes(seed, len(source), 3)
        found = pictures(source)
        for number in range(len(source)):
            pixels = found[f"{part}{number:04d}.png", f"{3 + 7 * made.labels_N[number]:02d}"]
            np.testing.assert_array_equal(pixels, made.decode(number))


def test_flowers(tmp_path):
    """Training images are trnid and valid, test images tstid; label k of the file is class k."""
    make_flowers(tmp_path / "flowers")
    train, test = (open_images(origin) for origin in flowers_origins(str(tmp_path / "flowers")))
    assert train.class_names == test.class_names == ("001", "002", "003")
    numbers = [[int(os.path.basename(s.name(i))[6:11]) for i in range(len(s))] for s in (train, test)]
    assert numbers == [[2, 4, 6, 8, 10, 12, *range(13, 19)], [1, 3, 5, 7, 9, 11]]
    for source, seed in ((train, 0), (test, 1)):
        made = shapes(seed, len(source), 3)
        np.testing.assert_array_equal(source.labels_N, made.labels_N)
        error = [abs(source.decode(i).astype(int) - made.decode(i)).mean() for i in range(len(source))]
        assert max(error) < 8  # of JPEG; another picture is 16 away at least


@pytest.mark.parametrize("make", [make_inaturalist, make_flowers])
def test_a_file_that_does_not_decode_is_left_out_as_everywhere(tmp_path, make):
    root = make(tmp_path / "set")
    [train, _] = (inaturalist_origins if make is make_inaturalist else flowers_origins)(str(root))
    first = open_images(train)
    broken, gone = first.name(3), first.name(5)
    with open(broken, "wb") as file:
        file.write(b"no image")
    os.unlink(gone)
    source = open_images(train, rescan=True)
    assert len(source) == 12
    assert source.excluded_X.tolist() == [3, 5]
    assert "No such file" in source.index.reason(5)
    np.testing.assert_array_equal(source.labels_N, first.labels_N)


def test_images_that_come_later_are_noticed(tmp_path):
    root = make_inaturalist(tmp_path / "set")
    folder = root / "train_val2018/Plantae/10"
    shutil.move(folder, tmp_path / "elsewhere")
    [train, _] = inaturalist_origins(str(root))
    assert len(open_images(train).excluded_X) == 4
    shutil.move(tmp_path / "elsewhere", folder)
    assert not len(open_images(train).excluded_X)


def test_two_years_in_one_folder_want_a_word(tmp_path):
    make_inaturalist(tmp_path)
    make_inaturalist(tmp_path, year=2019)
    with pytest.raises(DataError, match=r"holds train2018\.json and train2019\.json; name one file of them"):
        inaturalist_origins(str(tmp_path))
    path = str(tmp_path / "train2019.json")
    assert inaturalist_origins(path) == (path, str(tmp_path / "val2019.json"))
    assert inaturalist_origins(path, "other.json") == (path, "other.json")


def test_wrong_layouts(tmp_path):
    root = str(tmp_path)
    for call, words in (
        (lambda: inaturalist_origins(root), "no train2018.json or train2019.json; name one file"),
        (lambda: inaturalist_origins(f"{root}/none"), "No such file or directory"),
        (lambda: inaturalist_origins(f"{root}/val2018.json"), "is not named train.*; say in data.test"),
        (lambda: flowers_origins(root), "no setid.mat in it; expected jpg/image_00001.jpg"),
        (lambda: open_images(f"{root}/train2018.json"), "cannot read the annotations"),
        (
            lambda: open_images(f"{root}/setid.mat#tstid"),
            "cannot read .*imagelabels.mat': No such file.*; expected jpg",
        ),
    ):
        with pytest.raises(DataError, match=words) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"data\.test='x': setid\.mat says what to test on"):
        flowers_origins(root, "x")


def without(key):
    return lambda said: said.pop(key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("annotations"), "no key 'annotations'; expected images"),
        (without("categories"), "no key 'categories'"),
        (lambda said: said["images"][0].pop("file_name"), "no key 'file_name'"),
        (lambda said: said["images"][0].update(file_name=7), "no annotations of iNaturalist"),
        (lambda said: said["images"][0].update(file_name="a\0b"), "no annotations of iNaturalist: file_name='a"),
        (lambda said: said["images"][0].update(file_name="\ud800"), "no annotations of iNaturalist"),
        (lambda said: said["images"][0].update(id="x"), "no annotations of iNaturalist: invalid literal"),
        (lambda said: said["images"][0].update(id=float("inf")), "no annotations of iNaturalist: cannot convert"),
        (lambda said: said["annotations"][2].update(image_id=77), "an annotation is of image 77, which is not in it"),
        (lambda said: said["annotations"][2].update(category_id=5), "an annotation is of category 5, which is not"),
        (lambda said: said["annotations"].pop(), "11 annotations of 12 images; expected one of each"),
        (lambda said: said["annotations"].append(said["annotations"][0]), "13 annotations of 12 images"),
    ],
)
def test_damaged_annotations(tmp_path, change, words):
    path = make_inaturalist(tmp_path) / "train2018.json"
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))
    with pytest.raises(DataError, match=words) as error:
        open_images(str(path))
    assert "train2018.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_annotations_that_are_no_json(tmp_path):
    path = tmp_path / "train2018.json"
    for text in (b"", b'{"images": [', b"[1, 2]", b"\xff\xfe", b"[" * 10**5):
        path.write_bytes(text)
        with pytest.raises(DataError, match=r"train2018\.json': no annotations of iNaturalist") as error:
            open_images(str(path))
        assert len(str(error.value)) < 600


def test_images_that_are_not_unpacked(tmp_path):
    make_inaturalist(tmp_path / "i")
    shutil.rmtree(tmp_path / "i/train_val2018")
    with pytest.raises(DataError, match=r"no folder '.*/train_val2018'; '.*train2018\.json' has its images in it"):
        open_images(str(tmp_path / "i/train2018.json"))
    make_flowers(tmp_path / "f")
    shutil.rmtree(tmp_path / "f/jpg")
    with pytest.raises(DataError, match=r"no folder '.*/jpg'; '.*setid\.mat' has its images in it"):
        open_images(str(tmp_path / "f/setid.mat#tstid"))


@pytest.mark.parametrize(
    ("file", "arrays", "words"),
    [
        ("imagelabels.mat", {"labels": np.zeros((1, 18))}, "imagelabels.mat': must hold one label for each image"),
        ("imagelabels.mat", {"labels": np.full((1, 18), 10**9)}, "imagelabels.mat': must hold one label"),
        ("imagelabels.mat", {"labels": np.ones((1, 5))}, "setid.mat': image 11 has no label; .* 1 .. 5"),
        ("imagelabels.mat", {"labels": np.full((1, 18), 1.5)}, "a number that is not whole"),
        ("imagelabels.mat", {"names": np.ones((1, 18))}, "imagelabels.mat.*no array 'labels'; expected jpg"),
        (
            "imagelabels.mat",
            {"labels": np.array(["rose"], dtype=object)},
            "imagelabels.mat': no file of Flowers-102: ",
        ),
        ("setid.mat", {"trnid": np.ones((1, 3))}, "setid.mat.*no array 'tstid'"),
        ("setid.mat", {"tstid": np.array([[0, 3]])}, "setid.mat': image 0 has no label"),
    ],
)
def test_damaged_arrays(tmp_path, file, arrays, words):
    root = make_flowers(tmp_path / "set")
    save_arrays(root / file, arrays)
    with pytest.raises(DataError, match=words) as error:
        open_images(f"{root}/setid.mat#tstid")
    assert "\n" not in str(error.value)


def test_one_picture_of_each_is_no_other(tmp_path):
    """The comparison of `test_flowers` has power: other pictures differ by more than JPEG does."""
    made = shapes(0, 2, 3)
    assert abs(made.decode(0).astype(int) - made.decode(1)).mean() > 16
    Image.fromarray(made.decode(0)).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    with Image.open(tmp_path / "a.jpg") as image:
        assert abs(np.asarray(image).astype(int) - made.decode(0)).mean() < 8


def test_only_known_arrays_are_read(tmp_path):
    """The published hash or the owner's list lets a file in; scipy may crash on damaged bytes."""
    root = make_flowers(tmp_path / "set")
    sums = (root / "MD5SUMS").read_text()
    origin, path = f"{root}/setid.mat#tstid", root / "setid.mat"
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    with pytest.raises(
        DataError, match=r"setid\.mat': its MD5 is \w{32}, that of the published file a5357ecc"
    ) as error:
        open_images(origin)
    assert "\n" not in str(error.value)
    path.write_bytes(content)  # not made anew: savemat writes the time into the file
    (root / "MD5SUMS").unlink()
    with pytest.raises(
        DataError, match=r"imagelabels\.mat': its MD5 is .* run `md5sum \*\.mat > MD5SUMS` in its folder"
    ):
        open_images(origin)
    (root / "MD5SUMS").write_text(sums.replace("setid.mat", "other.mat"))
    with pytest.raises(DataError, match=r"setid\.mat': its MD5 is"):
        open_images(origin)
    (root / "MD5SUMS").write_text(sums.replace("  ", " *"))  # as md5sum --binary writes it
    assert len(open_images(origin)) == 6


def test_the_published_hashes_are_torchvisions():
    published = {name: md5 for name, md5 in Flowers102._file_dict.values() if name.endswith(".mat")}
    assert published == annotations._PUBLISHED
