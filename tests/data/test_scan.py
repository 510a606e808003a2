"""Trees, flat folders, lists, odd names, links, damaged files; an index is built only when needed."""

import os
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
import tifffile
from PIL import Image

from ccmim_fast.data.index import scan
from ccmim_fast.data.index.bad_samples import BadSamples, bad_samples_path, read_bad_samples
from ccmim_fast.data.index.index_file import Index, Listing, Row, rewrite_index, write_index
from ccmim_fast.data.index.indexed import index_path, open_images
from ccmim_fast.data.index.left_out import OTHER
from ccmim_fast.data.source import usable_count
from ccmim_fast.errors import DataError


def names(source):
    """Return the locations of the usable samples."""
    bad = set(source.excluded_X.tolist())
    return [source.index.location(number) for number in range(len(source)) if number not in bad]


def reasons(source):
    """Return the reasons of the samples that are not usable, by base name."""
    return {
        os.path.basename(source.index.location(number)): source.index.reason(number)
        for number in source.excluded_X.tolist()
    }


def notes(source):
    """Return the reasons of what gives no sample, by base name, without what is no image by its ending."""
    return {
        os.path.basename(path): note.reason for note in source.index.notes if note.kind != OTHER for path in note.paths
    }


def record(source, number, reason="spoiled"):
    BadSamples(source, "skip", 1.0).add(number, reason)


def touch_later(path):
    """Change a file's or folder's time as a later write does, however coarse the file system's clock is."""
    os.utime(path, ns=(time.time_ns() + 10**9,) * 2)


@pytest.fixture
def header_reads(monkeypatch):
    """Return a list that grows by one with each header that is read."""
    reads, read = [], scan.read_header

    def count(data, channels):
        reads.append(len(data))
        return read(data, channels)

    monkeypatch.setattr(scan, "read_header", count)
    return reads


def test_a_tree_has_a_class_per_folder(tmp_path, write_image):
    for name in ("b/2.png", "b/1.PNG", "a/deep/er/3.png", "a/0.png", "loose.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(tmp_path / name, height=5, width=9)
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a/notes.txt").write_text("no image")
    write_image(tmp_path / ".hidden/4.png")
    source = open_images(str(tmp_path))
    assert names(source) == ["a/0.png", "a/deep/er/3.png", "b/1.PNG", "b/2.png", "loose.png"]
    assert source.class_names == ("a", "b", "empty")
    assert source.labels_N.tolist() == [0, 0, 1, 1, -1]  # an image without a class is one to train on
    assert source.sizes_N2.tolist() == [[5, 9]] * 5
    assert source.sizes_N2.dtype == np.int32
    assert source.decode(0).shape == (5, 9, 3)
    assert source.index.modes() == {"RGB": 5}
    assert notes(source) == {}


def test_a_flat_folder_has_no_labels(tmp_path, write_image):
    write_image(tmp_path / "b.png")
    write_image(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    source = open_images(str(tmp_path))
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
    root = os.path.join(os.fsencode(tmp_path), b"fol der\n\xe9")
    os.mkdir(root)
    for seed, name in enumerate(odd):
        with open(os.path.join(root, name), "wb") as file:
            write_image(file, seed=seed)
    with open(os.path.join(root, b"bad\n\xe9.png"), "wb") as file:
        file.write(b"damaged")
    for _ in range(2):  # once built, once opened
        source = open_images(os.fsdecode(root))
        assert [os.fsencode(name) for name in names(source)] == sorted(odd)
        assert all(source.decode(n).any() and source.read(n) for n in range(len(source)) if n not in source.excluded_X)
        assert len(source.excluded_X) == 1
    gone = names(source)[0]
    os.unlink(os.path.join(root, os.fsencode(gone)))
    number = next(n for n in range(len(source)) if source.index.location(n) == gone)
    with pytest.raises(DataError) as error:
        source.decode(number)
    assert str(error.value).isprintable()  # one line that any terminal takes
    record(source, number, str(error.value))
    assert read_bad_samples(source.index) == {number: str(error.value)}
    assert len(open_images(os.fsdecode(root))) == len(odd)  # the folder changed: built again, less the file that went


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
    source = open_images(str(tmp_path))
    assert names(source) == ["a/linked.png", "a/x.png", "b/same.png"]
    assert source.labels_N.tolist() == [0, 0, 1]
    assert source.class_names == ("a", "b")
    assert notes(source) == {"self": "links in a loop", "gone.png": "broken link"}


def test_unusable_files_are_excluded_with_the_reason(tmp_path, write_image, monkeypatch):
    write_image(tmp_path / "good.png")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is no image")
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("LAB", (4, 4)).save(tmp_path / "lab.tif")
    tifffile.imwrite(tmp_path / "complex.tif", np.ones((4, 4), dtype=np.complex64))
    Image.new("1", (11000, 11000)).save(tmp_path / "large.png")
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    write_image(tmp_path / "locked.png")
    read = scan.Storage.read

    def refuse(self, location, *where, **how):
        if location == "locked.png":
            raise PermissionError(13, "Permission denied", location)
        return read(self, location, *where, **how)

    monkeypatch.setattr(scan.Storage, "read", refuse)  # the tests may run as root, who may read anything
    source = open_images(str(tmp_path))
    assert names(source) == ["good.png"]
    assert len(source) == 9
    assert usable_count(source) == 1
    found = reasons(source)
    assert found.pop("bomb.png").count("pixels")
    assert found.pop("lab.tif") == "a TIFF of CIELAB pixels of 8 bits; convert it to gray or RGB"
    assert found.pop("complex.tif") == "values of type complex64; pixels are whole or real numbers"
    assert found == {
        "empty.jpg": "empty file",
        "text.jpg": "not an image that Pillow knows",
        "pipe.png": "not a regular file",
        "large.png": "11000 x 11000 pixels are more than 100,000,000",
        "locked.png": "Permission denied",
    }
    # What could not be read is read again whenever the index is made again.
    monkeypatch.setattr(scan.Storage, "read", read)
    write_image(tmp_path / "new.png")
    touch_later(tmp_path)
    assert names(open_images(str(tmp_path))) == ["good.png", "locked.png", "new.png"]


def test_a_folder_without_images_is_one_line(tmp_path, monkeypatch):
    missing = tmp_path / "missing"
    with pytest.raises(DataError, match=r"no folder '.*missing'; set data\.root"):
        open_images(str(missing))
    with pytest.raises(DataError, match=r"no folder ''; set data\.root"):
        open_images("")
    with pytest.raises(DataError, match=r"no image in .*ends in \.jpg"):
        open_images(str(tmp_path))
    (tmp_path / "a.jpg").write_text("text")
    with pytest.raises(DataError, match=r"no readable image in .*: 1 skipped, the first 'a\.jpg': not an image"):
        open_images(str(tmp_path))
    assert not os.path.exists(index_path(str(tmp_path), 3))

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match=r"cannot look into '.*': Permission denied"):
        open_images(str(tmp_path))


def test_a_file_that_goes_bad_later_is_named(tmp_path, photograph):
    for name in ("cut.jpg", "gone.jpg", "hole.jpg", "other.jpg"):
        photograph.save(tmp_path / name)
    source = open_images(str(tmp_path))
    cut, hole, other = (tmp_path / name for name in ("cut.jpg", "hole.jpg", "other.jpg"))
    size = len(cut.read_bytes())
    cut.write_bytes(cut.read_bytes()[:3000])
    (tmp_path / "gone.jpg").unlink()
    hole.write_bytes(b"x" * size)
    photograph.resize((200, 200)).save(other)
    other.write_bytes(other.read_bytes().ljust(size, b"\0"))
    with pytest.raises(DataError, match=rf"cut\.jpg' has 3000 bytes, and {size} when it was indexed"):
        source.decode(0)
    with pytest.raises(DataError, match=r"cannot read '.*gone\.jpg': No such file"):
        source.decode(1)
    with pytest.raises(DataError, match=r"cannot read '.*gone\.jpg': No such file"):
        source.read(1)
    with pytest.raises(DataError, match=r"cannot decode '.*hole\.jpg': not an image"):
        source.decode(2)
    with pytest.raises(DataError, match=r"other\.jpg' was \(300, 400, 3\) when indexed"):
        source.decode(3)


def test_other_channel_counts_are_npy_and_tiff_files(tmp_path, write_image):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 5), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "b.npy", pixels[0])
    np.save(tmp_path / "c.npy", pixels[..., :4])
    (tmp_path / "d.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:150])
    np.save(tmp_path / "e.npy", np.array([{}], dtype=object), allow_pickle=True)
    write_image(tmp_path / "f.png")
    planes = np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
    tifffile.imwrite(tmp_path / "g.tif", pixels, photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "h.tif", planes, photometric="minisblack", planarconfig="separate")
    tifffile.imwrite(tmp_path / "i.tiff", planes, photometric="minisblack")  # a page each
    (tmp_path / "j.tif").write_bytes((tmp_path / "g.tif").read_bytes()[:100])
    source = open_images(str(tmp_path), channels=5)
    assert names(source) == ["a.npy", "g.tif", "h.tif", "i.tiff"]
    for number in range(len(source)):
        if number not in source.excluded_X:
            assert source.sizes_N2[number].tolist() == [6, 7]
            assert (source.decode(number) == pixels).all()
    assert reasons(source).keys() == {"b.npy", "c.npy", "d.npy", "e.npy", "j.tif"}
    assert reasons(source)["b.npy"] == "uint8 [7, 5] is not [height, width, 5] or [5, height, width]"
    assert reasons(source)["d.npy"] == "cut off: 22 of 210 bytes of pixels"


def test_a_list_names_files_and_classes(tmp_path, write_image):
    (tmp_path / "in").mkdir()
    for seed, name in enumerate(("z.png", "in/a b.png", "outside.png")):
        write_image(tmp_path / name, seed=seed)
    (tmp_path / "in/link.png").symlink_to(tmp_path / "nowhere")
    lines = ["z.png\tcat", "in/a b.png\tdog", f"{tmp_path}/outside.png\tcat", "gone.png\tdog", "in/link.png\tdog", ""]
    origin = tmp_path / "train.txt"
    origin.write_text("\r\n".join(lines))
    source = open_images(str(origin))
    assert names(source) == ["z.png", "in/a b.png", "outside.png"]  # in the order of the list
    assert source.class_names == ("cat", "dog")
    assert source.labels_N.tolist() == [0, 1, 0, 1, 1]
    assert reasons(source) == {"gone.png": "No such file or directory", "link.png": "broken link"}
    origin.write_text("z.png\n")
    touch_later(origin)
    assert names(open_images(str(origin))) == ["z.png"]
    assert open_images(str(origin)).labels_N is None
    with pytest.raises(DataError, match=r"cannot read the list '.*none\.txt': No such file"):
        open_images(str(tmp_path / "none.txt"))


def test_only_what_changed_is_read_again(tmp_path, write_image, header_reads):
    for index in range(6):
        (tmp_path / f"{'ab'[index % 2]}").mkdir(exist_ok=True)
        write_image(tmp_path / f"{'ab'[index % 2]}" / f"{index}.png", height=10 + index)
    first = open_images(str(tmp_path))
    assert len(header_reads) == 6
    state = os.stat(first.index.path)
    assert open_images(str(tmp_path)).fingerprint == first.fingerprint
    after = os.stat(first.index.path)
    assert (after.st_ino, after.st_mtime_ns) == (state.st_ino, state.st_mtime_ns)  # not built again
    assert len(header_reads) == 6

    write_image(tmp_path / "b/6.png", height=16)
    (tmp_path / "a/0.png").unlink()
    write_image(tmp_path / "a/2.png", height=99)
    touch_later(tmp_path / "a/2.png")
    touch_later(tmp_path / "b")
    source = open_images(str(tmp_path))
    assert len(header_reads) == 6 + 2
    assert source.fingerprint != first.fingerprint
    assert names(source) == ["a/2.png", "a/4.png", "b/1.png", "b/3.png", "b/5.png", "b/6.png"]
    assert source.sizes_N2[:, 0].tolist() == [99, 14, 11, 13, 15, 16]
    assert source.labels_N.tolist() == [0, 0, 1, 1, 1, 1]

    (tmp_path / "0new").mkdir()  # a class before the others moves their labels
    write_image(tmp_path / "0new/x.png")
    touch_later(tmp_path)
    assert open_images(str(tmp_path)).labels_N.tolist() == [0, 1, 1, 2, 2, 2, 2]
    assert len(header_reads) == 6 + 2 + 1


def test_bad_samples_are_moved_into_the_index_when_the_index_is_made_again(tmp_path, write_image, header_reads):
    for index in range(5):
        write_image(tmp_path / f"{index}.png", seed=index)
    first = open_images(str(tmp_path))
    record(first, 1)
    record(first, 3)
    again = open_images(str(tmp_path))
    assert again.fingerprint == first.fingerprint  # records alone change nothing: the stream stays as it is
    assert len(again.excluded_X) == 0
    assert read_bad_samples(again.index) == {1: "spoiled", 3: "spoiled"}

    write_image(tmp_path / "5.png", seed=5)
    write_image(tmp_path / "3.png", seed=33)  # mended since
    touch_later(tmp_path / "3.png")
    touch_later(tmp_path)
    source = open_images(str(tmp_path))
    assert reasons(source) == {"1.png": "spoiled"}
    assert names(source) == ["0.png", "2.png", "3.png", "4.png", "5.png"]
    assert read_bad_samples(source.index) == {}
    assert len(header_reads) == 5 + 2


def test_a_mended_file_is_usable_when_the_index_is_made_again(tmp_path, write_image):
    for index in range(3):
        write_image(tmp_path / f"{index}.png", seed=index)
    first = open_images(str(tmp_path))
    record(first, 1)
    data = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(
        data
    )  # of the same length: the index comes out as it was, with or without the record
    touch_later(tmp_path / "1.png")
    touch_later(tmp_path)
    source = open_images(str(tmp_path))
    assert source.fingerprint == first.fingerprint
    assert read_bad_samples(source.index) == {}


@pytest.mark.parametrize("damage", ["empty", "cut", "half", "text", "footer", "zeros"])
def test_a_damaged_index_is_built_anew(tmp_path, write_image, damage):
    write_image(tmp_path / "a.png")
    path = open_images(str(tmp_path)).index.path
    with open(path, "rb") as file:
        whole = file.read()
    content = {
        "empty": b"",
        "cut": whole[:-1],
        "half": whole[: len(whole) // 2],
        "text": b"no index",
        "footer": whole[:-200] + b"\xff" * 190 + whole[-10:],
        "zeros": bytes(len(whole)),
    }[damage]
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(DataError, match="is not a whole index") as error:
        Index(path)
    assert "\n" not in str(error.value)
    assert names(open_images(str(tmp_path))) == ["a.png"]
    with open(path, "rb") as file:
        assert file.read() == whole


def test_an_index_of_something_else_is_not_used(tmp_path, write_image, header_reads):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / f"{name}.png")
    path = str(tmp_path / "index.arrow")
    assert names(open_images(str(tmp_path / "one"), path=path)) == ["one.png"]
    assert names(open_images(str(tmp_path / "two"), path=path)) == ["two.png"]
    assert open_images(str(tmp_path / "two"), channels=1, path=path).decode(0).shape[2] == 1
    other = pa.table({"a": [1]}).replace_schema_metadata({"ccmim": '{"format": 99}'})
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, other.schema) as writer:
        writer.write_table(other)
    with pytest.raises(DataError, match=r"is of format 99, not \d+; ccmim data index makes it anew"):
        Index(path)
    assert names(open_images(str(tmp_path / "two"), path=path)) == ["two.png"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, write_image, monkeypatch):
    (tmp_path / "images").mkdir()
    write_image(tmp_path / "images/a.png")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file/below"))  # root may write to any folder, but not here
    with pytest.raises(DataError, match=r"cannot write the index '.*': Not a directory; set data\.index") as error:
        open_images(str(tmp_path / "images"))
    assert "\n" not in str(error.value)
    source = open_images(str(tmp_path / "images"), path=str(tmp_path / "elsewhere/i.arrow"))
    assert names(source) == ["a.png"]
    os.mkdir(bad_samples_path(source.index.path))  # nor can a bad sample be recorded; the run goes on
    record(source, 0)
    assert read_bad_samples(source.index) == {}


def many_rows(count):
    for number in range(count):
        location = b"n%08d/n%08d_%07d.JPEG" % (number // 1300, number // 1300, number)  # ImageNet's names
        yield Row(location, -1, 0, 110_000 + number, 10**18 + number, (375, 500), 1, "RGB", 1, number // 1300)


def test_an_index_is_small_and_opens_without_being_read(tmp_path):
    count, path = 70_000, str(tmp_path / "i.arrow")  # more than are written at a time
    write_index(path, Listing("/r", many_rows(count), map(str, range(54)), {}, []), origin="/r", channels=3)
    assert os.path.getsize(path) / count * 1_281_167 <= 250e6
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    index = Index(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pa.total_allocated_bytes() == before  # the columns are the file's own pages
    assert peak < 2 * count + 100_000  # a byte of each row, its status, is read
    assert len(index) == count
    last = count - 1
    assert index.row(last) == next(row for row in many_rows(count) if row.mtime_ns == 10**18 + last)._replace(
        size=[375, 500]
    )
    copied = rewrite_index(index, {"status": pa.array(index.status_N)})
    assert copied.fingerprint == index.fingerprint  # of what is said, not of how it is stored


def test_a_header_longer_than_the_first_read_is_found(tmp_path, photograph, monkeypatch):
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    photograph.save(tmp_path / "a.jpg", exif=exif)
    photograph.save(tmp_path / "b.webp")
    monkeypatch.setattr(scan, "HEADER_BYTES", 1000)
    assert open_images(str(tmp_path)).sizes_N2.tolist() == [[300, 400]] * 2
