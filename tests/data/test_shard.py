"""Shards: their contents, and their use as a data set."""

import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from ccmim_fast.data.index import indexed
from ccmim_fast.data.index.decode import EXIF_ORIENTATION, decode
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.index.own import BESIDE
from ccmim_fast.data.shard import shrink, write_shards
from ccmim_fast.data.source import usable_count, usable_ids
from ccmim_fast.data.stream.permutation import epoch_order
from ccmim_fast.errors import ConfigError, DataError

SIDE = 40
BAD = ("00.jpg", "01.jpg", "02.jpg")


@pytest.fixture
def source(tmp_path, photo_folder, photograph, monkeypatch):
    """Open the photographs with four more: one is turned by EXIF, one gray, one small, one no image."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "photos"
    shutil.copytree(photo_folder, root)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    photograph.resize((90, 60)).save(root / "class0/turned.jpg", exif=exif)
    photograph.convert("L").resize((60, 90)).save(root / "class0/gray.png")
    photograph.resize((30, 70)).save(root / "class1/small.JPEG")
    (root / "class1/text.jpg").write_text("this is no image")
    return open_images(str(root))


def originals(source, seed=0):
    """Return the ids of the source in the order of the tars."""
    count = usable_count(source)
    return usable_ids(source, epoch_order(seed, 0, count, np.arange(count))).tolist()


def test_bytes_are_copied_and_pixels_stay(source, tmp_path):
    index, left_out = write_shards(source, str(tmp_path / "tars"), workers=2)
    tars = open_images(str(tmp_path / "tars"))
    order = originals(source)
    assert order != sorted(order)
    assert len(tars) == 25 == len(index)
    for number, original in enumerate(order):
        assert tars.encoded(number) == source.encoded(original)
        assert (tars.decode(number) == source.decode(original)).all()
        assert tars.index.row(number)[5:9] == source.index.row(original)[5:9]  # size, orientation, mode, plain
    assert tars.labels_N.tolist() == source.labels_N[order].tolist()
    assert tars.class_names == ("class0", "class1")
    assert [(source.name(n)[-8:], reason) for n, reason in left_out] == [("text.jpg", "not an image that Pillow knows")]


def test_python_reads_them_as_webdataset_does(source, tmp_path):
    write_shards(source, str(tmp_path / "tars"), shard_bytes=30_000, workers=2)
    names = sorted(os.listdir(tmp_path / "tars"))
    assert names[0] == BESIDE
    assert names[1:] == [f"shard-{i:06d}.tar" for i in range(len(names) - 1)]
    assert len(names) > 3
    order, found = originals(source), []
    for name in names[1:]:
        with tarfile.open(tmp_path / "tars" / name) as tar:
            members = tar.getmembers()
            found += [(member.name, tar.extractfile(member).read()) for member in members]
        # All but the last sample begin before the limit.
        assert members[-2].offset <= 30_000
    for number, (image, label) in enumerate(zip(found[::2], found[1::2], strict=True)):
        key, suffix = image[0].split(".")
        assert key == f"{number:09d}"
        assert suffix == source.name(order[number]).rpartition(".")[2].lower()
        assert image[1] == source.encoded(order[number])
        assert label == (f"{key}.cls", str(source.labels_N[order[number]]).encode())


def test_larger_images_are_shrunk(source, tmp_path):
    _, left_out = write_shards(source, str(tmp_path / "tars"), side=SIDE, quality=95, workers=2)
    tars = open_images(str(tmp_path / "tars"))
    assert len(left_out) == 1
    for number, original in enumerate(originals(source)):
        size, before = tars.sizes_N2[number], source.sizes_N2[original]
        name = source.name(original)
        if min(before) <= SIDE:
            assert tars.encoded(number) == source.encoded(original)
            continue
        assert size.min() == SIDE
        assert size.tolist() == [round(SIDE * before[0] / before.min()), round(SIDE * before[1] / before.min())]
        assert tars.index.row(number).orientation == 1
        assert tars.index.row(number).mode == ("L" if "gray" in name else "RGB")
        assert tars.index.plain_N[number]
        # Upright: the same picture as the source's, shrunk.
        wanted = Image.fromarray(source.decode(original)).resize(size[::-1].tolist(), Image.Resampling.BICUBIC)
        difference = np.asarray(wanted).astype(int) - tars.decode(number)
        assert np.abs(difference).mean() < 8, name
    assert {os.path.splitext(tars.index.location(n))[1] for n in range(len(tars))} == {".jpg", ".jpeg"}


def test_the_order_is_the_seeds(source, tmp_path):
    first, same, other = (
        write_shards(source, str(tmp_path / name), seed=seed, workers=2)[0]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert (tmp_path / "a/shard-000000.tar").read_bytes() == (tmp_path / "b/shard-000000.tar").read_bytes()
    assert first.fingerprint == same.fingerprint != other.fingerprint
    tars = open_images(str(tmp_path / "c"))
    assert [tars.encoded(n) for n in range(25)] == [source.encoded(n) for n in originals(source, 2)]


def test_they_may_be_moved_and_are_not_scanned(source, tmp_path, monkeypatch):
    write_shards(source, str(tmp_path / "tars"), shard_bytes=30_000, workers=2)
    before = open_images(str(tmp_path / "tars"))
    pixels = [before.decode(number) for number in range(len(before))]
    shutil.copytree(tmp_path / "tars", tmp_path / "copy")
    shutil.move(tmp_path / "tars", tmp_path / "moved")

    def refuse(*_):
        raise AssertionError("scanned")

    monkeypatch.setattr(indexed, "build_index", refuse)
    for name in ("copy", "moved"):
        for rescan in (False, True):
            tars = open_images(str(tmp_path / name), rescan=rescan)
            assert tars.fingerprint == before.fingerprint
            assert str(tmp_path / name) in tars.name(0)
            assert all((tars.decode(number) == image).all() for number, image in enumerate(pixels))


def test_their_index_is_not_written_over(source, tmp_path):
    write_shards(source, str(tmp_path / "tars"), workers=2)
    before = (tmp_path / "tars" / BESIDE).read_bytes()
    gray = open_images(str(tmp_path / "tars"), channels=1)
    assert gray.decode(0).shape[2] == 1
    assert str(tmp_path / "cache") in gray.index.path
    assert (tmp_path / "tars" / BESIDE).read_bytes() == before
    # An index that was moved away from its tars is not taken for that of others.
    shutil.copy(tmp_path / "tars" / BESIDE, tmp_path / "lone.arrow")
    tars = open_images(str(tmp_path / "tars"), path=str(tmp_path / "lone.arrow"))
    assert (tars.decode(0) == open_images(str(tmp_path / "tars")).decode(0)).all()


def test_without_classes_there_are_no_labels(tmp_path, write_image, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "flat").mkdir()
    for seed in range(3):
        write_image(tmp_path / f"flat/{seed}.png", seed=seed)
    write_shards(open_images(str(tmp_path / "flat")), str(tmp_path / "tars"), workers=1)
    assert open_images(str(tmp_path / "tars")).labels_N is None
    with tarfile.open(tmp_path / "tars/shard-000000.tar") as tar:
        assert tar.getnames() == [f"00000000{i}.png" for i in range(3)]


def test_arrays_are_copied_and_not_resized(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "arrays").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 5), dtype=np.uint8)
    np.save(tmp_path / "arrays/a.npy", pixels)
    source = open_images(str(tmp_path / "arrays"), channels=5)
    with pytest.raises(ConfigError, match="--side=4: images of 5 channels"):
        write_shards(source, str(tmp_path / "tars"), side=4)
    write_shards(source, str(tmp_path / "tars"), workers=1)
    assert (open_images(str(tmp_path / "tars"), channels=5).decode(0) == pixels).all()


def test_what_went_bad_meanwhile_is_left_out_and_told(source, tmp_path):
    gone, other, cut = (next(source.name(n) for n in range(26) if name in source.name(n)) for name in BAD)
    os.unlink(gone)
    with open(other, "rb+") as file:
        file.write(b"x" * 100)
    with open(cut, "rb+") as file:
        file.truncate(500)
    index, left_out = write_shards(source, str(tmp_path / "tars"), workers=2)
    assert len(index) == 22
    reasons = {os.path.basename(source.name(number)): reason for number, reason in left_out}
    assert set(reasons) == {"text.jpg", *BAD}
    assert "No such file" in reasons["00.jpg"]
    assert "not an image" in reasons["01.jpg"]
    assert "when it was indexed" in reasons["02.jpg"]
    keys = [index.location(number)[:9] for number in range(22)]
    assert keys == [f"{number:09d}" for number in range(22)]


def test_a_folder_that_is_not_empty_is_refused(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep")
    with pytest.raises(DataError, match=r"full' is not empty; name a new folder"):
        write_shards(source, str(tmp_path / "full"))
    assert os.listdir(tmp_path / "full") == ["mine.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write tars to .*file': File exists"):
        write_shards(source, str(tmp_path / "file"))


@pytest.mark.parametrize(("height", "width"), [(50, 80), (80, 50), (41, 41), (41, 1000)])
def test_the_shorter_side_is_exact(height, width):
    image_HWC = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    made = decode(shrink(image_HWC, SIDE, 90), 3)
    assert min(made.shape[:2]) == SIDE
    assert max(made.shape[:2]) == round(max(height, width) * SIDE / min(height, width))
    gray = shrink(image_HWC[..., :1], SIDE, 90)
    assert decode(gray, 1).shape == (*made.shape[:2], 1)
    assert shrink(np.repeat(image_HWC[..., :1], 3, axis=2), SIDE, 90) == gray
