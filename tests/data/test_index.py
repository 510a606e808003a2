"""Folders: trees and flat ones, odd names, links, damaged files."""

import os

import numpy as np
import pytest
from PIL import Image

from ccmim_fast.data import decode as decode_module
from ccmim_fast.data.index import scan_folder
from ccmim_fast.errors import DataError


def names(source):
    return [os.path.relpath(path, source.root) for path in source.paths]


def test_a_tree_has_a_class_per_folder(tmp_path, write_image):
    for name in ("b/2.png", "b/1.PNG", "a/deep/er/3.png", "a/0.png", "loose.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(tmp_path / name, height=5, width=9)
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a/notes.txt").write_text("no image")
    write_image(tmp_path / ".hidden/4.png")
    source = scan_folder(str(tmp_path))
    assert names(source) == ["a/0.png", "a/deep/er/3.png", "b/1.PNG", "b/2.png"]
    assert source.class_names == ("a", "b", "empty")
    assert source.labels_N.tolist() == [0, 0, 1, 1]
    assert source.labels_N.dtype == np.int64
    assert source.sizes_N2.tolist() == [[5, 9]] * 4
    assert source.sizes_N2.dtype == np.int32
    assert source.decode(0).shape == (5, 9, 3)
    assert [os.path.basename(path) for path, _ in source.skipped] == ["loose.png"]


def test_a_flat_folder_has_no_labels(tmp_path, write_image):
    write_image(tmp_path / "b.png")
    write_image(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    source = scan_folder(str(tmp_path))
    assert names(source) == ["a.png", "b.png"]
    assert source.labels_N is None
    assert source.class_names == ()


def test_any_name_works(tmp_path, write_image):
    odd = [
        b"caf\xc3\xa9.png",
        b"latin\xe9.png",
        b"a b\nc.png",
        b"x" * 251 + b".png",
        b"'\"`$(ls).png",
        b"\xf0\x9f\x90\x88.png",
    ]
    root = os.fsencode(tmp_path)
    for seed, name in enumerate(odd):
        with open(os.path.join(root, name), "wb") as file:
            write_image(file, seed=seed)
    with open(os.path.join(root, b"bad\n\xe9.png"), "wb") as file:
        file.write(b"damaged")
    source = scan_folder(str(tmp_path))
    assert [os.fsencode(name) for name in names(source)] == sorted(odd)
    assert all(source.decode(index).any() and source.read(index) for index in range(len(odd)))
    assert len(source.skipped) == 1
    os.unlink(os.path.join(root, sorted(odd)[0]))
    with pytest.raises(DataError) as error:
        source.decode(0)
    assert str(error.value).isprintable()  # one line that any terminal takes


def test_each_real_file_counts_once(tmp_path, write_image):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / "x.png")
    (tmp_path / "a/loop").symlink_to(tmp_path / "a")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/self").symlink_to(tmp_path / "a/self")
    (tmp_path / "a/to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b/same.png").symlink_to(tmp_path / "b/x.png")
    (tmp_path / "b/gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "c").symlink_to(tmp_path / "b")
    (tmp_path / "root").symlink_to(tmp_path)
    outside = tmp_path.parent / f"{tmp_path.name}-outside.png"
    write_image(outside)
    (tmp_path / "a/linked.png").symlink_to(outside)
    source = scan_folder(str(tmp_path))
    assert names(source) == ["a/linked.png", "a/x.png", "b/same.png"]
    assert source.labels_N.tolist() == [0, 0, 1]
    assert source.class_names == ("a", "b")
    assert {os.path.basename(path): reason for path, reason in source.skipped} == {
        "self": "broken link",
        "gone.png": "broken link",
    }


def test_unusable_files_are_left_out_with_the_reason(tmp_path, write_image, monkeypatch):
    write_image(tmp_path / "good.png")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is no image")
    os.mkfifo(tmp_path / "pipe.png")
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.ones((4, 4), dtype=np.int32)).save(tmp_path / "int.tif")
    Image.new("1", (11000, 11000)).save(tmp_path / "large.png")
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    write_image(tmp_path / "locked.png")
    opened = Image.open

    def refuse(path, *args):
        if str(path).endswith("locked.png"):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *args)

    monkeypatch.setattr(decode_module.Image, "open", refuse)  # the tests may run as root, who may read anything
    source = scan_folder(str(tmp_path))
    assert names(source) == ["good.png"]
    reasons = {os.path.basename(path): reason for path, reason in source.skipped}
    assert reasons.pop("bomb.png").count("pixels")
    assert reasons.pop("float.tif").startswith("TIFF pixels of mode F")
    assert reasons.pop("int.tif").startswith("TIFF pixels of mode I")
    assert reasons == {
        "empty.jpg": "empty file",
        "text.jpg": "not an image that Pillow knows",
        "pipe.png": "not a regular file",
        "large.png": "11000 x 11000 pixels are more than 100,000,000",
        "locked.png": "Permission denied",
    }


def test_a_folder_without_images_is_one_line(tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(DataError, match=r"no folder '.*missing'; set data\.root"):
        scan_folder(str(missing))
    with pytest.raises(DataError, match=r"no image in .*ends in \.bmp"):
        scan_folder(str(tmp_path))
    (tmp_path / "a.jpg").write_text("text")
    with pytest.raises(DataError, match=r"no readable image in .*: 1 skipped, the first '.*a\.jpg': not an image"):
        scan_folder(str(tmp_path))


def test_a_file_that_goes_bad_later_is_named(tmp_path, photograph):
    for name in ("cut.jpg", "gone.jpg", "other.jpg"):
        photograph.save(tmp_path / name)
    source = scan_folder(str(tmp_path))
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:3000])
    (tmp_path / "gone.jpg").unlink()
    photograph.resize((200, 200)).save(tmp_path / "other.jpg")
    with pytest.raises(DataError, match=r"cannot decode '.*cut\.jpg'.*truncated"):
        source.decode(0)
    with pytest.raises(DataError, match=r"cannot decode '.*gone\.jpg': No such file"):
        source.decode(1)
    with pytest.raises(DataError, match=r"cannot read '.*gone\.jpg': No such file"):
        source.read(1)
    with pytest.raises(DataError, match=r"other\.jpg' was \(300, 400, 3\) when indexed"):
        source.decode(2)


def test_other_channel_counts_are_npy_files(tmp_path, write_image):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 5), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "b.npy", pixels.astype(np.uint16))
    np.save(tmp_path / "c.npy", pixels[..., :4])
    (tmp_path / "d.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:150])
    np.save(tmp_path / "e.npy", np.array([{}], dtype=object), allow_pickle=True)
    write_image(tmp_path / "f.png")
    source = scan_folder(str(tmp_path), channels=5)
    assert names(source) == ["a.npy"]
    assert source.sizes_N2.tolist() == [[6, 7]]
    assert (source.decode(0) == pixels).all()
    assert len(source.skipped) == 4
    assert dict(source.skipped)[str(tmp_path / "b.npy")] == "uint16 [6, 7, 5] is not uint8 [height, width, 5]"
