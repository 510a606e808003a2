"""An index, and the records beside it, are written over what carries our own mark, and over nothing else."""

import os
import socket

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from made_containers import encode, image_table

from ccmim_fast.data.index.bad_samples import bad_samples_path, read_bad_samples
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.index.own import is_index, marked, read_regular
from ccmim_fast.data.verify import verify
from ccmim_fast.errors import DataError


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encode(number))
    return str(folder)


def foreign(path, kind):
    """Make something at a path that is no index."""
    if kind == "image":
        path.write_bytes(encode(0))
    elif kind == "actions":  # of a bulk upload to a search engine
        path.write_text('{"index": {"_id": 1}}\n{"title": "mine"}\n')
    elif kind == "empty":
        path.touch()
    elif kind == "table":
        feather.write_feather(image_table([encode(0)]), path, compression="uncompressed")
    elif kind == "parquet":
        pq.write_table(image_table([encode(0)]), path)
    elif kind == "features":  # ours, too, but no index
        schema = marked(pa.schema([("name", pa.string())]), {"features": 7})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema):
            pass
    elif kind == "stream":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.schema([("a", pa.int8())])):
            pass
    elif kind == "start":
        path.write_bytes(b"ARROW1\0\0")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to nothing":
        path.symlink_to("nowhere")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    return os.lstat(path)


KINDS = [
    "image",
    "actions",
    "empty",
    "features",
    "table",
    "parquet",
    "stream",
    "start",
    "folder",
    "fifo",
    "link to nothing",
    "socket",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beside", ["", ".bad", ".verify"])
def test_what_is_not_ours_is_refused_by_name_and_stays(tmp_path, images, kind, beside, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"mine{beside}"
    before = foreign(path, kind)
    with pytest.raises(DataError, match=rf"mine{beside}' is no (index|record).*set data\.index to another file"):
        open_images(images, path=str(tmp_path / "mine"))
    after = os.lstat(path)
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    assert sorted(os.listdir(tmp_path)) == ["images", path.name]


def test_a_device_is_no_place_for_an_index(images):
    with pytest.raises(DataError, match=r"'/dev/null' is no index"):
        open_images(images, path="/dev/null")
    assert not os.path.isfile("/dev/null")


def test_an_index_is_written_over_by_its_mark_and_behind_a_link(tmp_path, images):
    path = tmp_path / "deep/index.arrow"
    source = open_images(images, path=str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])  # cut by a full disk: the mark is at the beginning
    assert is_index(str(path))
    (tmp_path / "link.arrow").symlink_to(path)
    assert open_images(images, path=str(tmp_path / "link.arrow")).fingerprint == source.fingerprint
    assert (tmp_path / "link.arrow").is_symlink()
    assert path.read_bytes() == whole


def test_where_every_image_is_bad_the_old_index_stays(tmp_path, images):
    path = tmp_path / "index.arrow"
    open_images(images, path=str(path))
    before = path.read_bytes()
    for number in range(3):
        (tmp_path / f"images/{number}.png").write_bytes(b"x")
    with pytest.raises(DataError, match="no readable image"):
        open_images(images, path=str(path), rescan=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "line",
    [
        '"id": 1, "reason": 7',
        '"id": 1, "reason": null',
        '"id": 1, "reason": [["x"]]',
        '"id": 1, "reason": "  "',
        '"id": [1], "reason": "x"',
        '"id": 1.0, "reason": "x"',
        '"id": true, "reason": "x"',
        '"id": -1, "reason": "x"',
        '"id": 99, "reason": "x"',
        '"id": {}, "reason": {}',
        '"id": 1, "reason": "x"}{',
        f'"id": 1, "reason": {"[" * 100_000}',
    ],
)
def test_a_record_that_no_run_has_written_is_passed_over(tmp_path, images, line):
    source = open_images(images, path=str(tmp_path / "i.arrow"))
    start = f'{{"index": "{source.fingerprint}", '
    good = f'{start}"id": 2, "reason": "spoiled"}}\n'
    for name, mine in ((bad_samples_path(source.index.path), good), (f"{source.index.path}.verify", "")):
        with open(name, "w") as file:
            file.write(f"{start}{line}}}\n{mine}")
    assert read_bad_samples(open_images(images, path=str(tmp_path / "i.arrow")).index) == {2: "spoiled"}


@pytest.mark.parametrize(
    "line",
    [
        '"done": 1, "bad": []',
        '"done": ["x"], "bad": []',
        '"done": [0, 99], "bad": []',
        '"done": [0], "bad": [[0, null]]',
        '"done": [0], "bad": [[[0], "x"]]',
        '"done": [0], "bad": 3',
    ],
)
def test_a_log_of_verify_that_no_call_has_written_is_passed_over(tmp_path, images, line, monkeypatch):
    monkeypatch.setattr(
        "ccmim_fast.data.verify._decode_chunks", lambda opener, chunks, n: ((one, []) for one in chunks)
    )
    index = open_images(images, path=str(tmp_path / "i.arrow")).index
    with open(f"{index.path}.verify", "w") as file:
        file.write(f'{{"index": "{index.fingerprint}", {line}}}\n')
    assert verify(index, 1).bad == []
    assert open_images(images, path=str(tmp_path / "i.arrow")).index.status_N.tolist() == [1, 1, 1]


def test_a_verify_that_is_stopped_at_once_leaves_a_log_that_is_taken_up(tmp_path, images, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("ccmim_fast.data.verify._decode_chunks", stopped)
    place = str(tmp_path / "i.arrow")
    with pytest.raises(KeyboardInterrupt):
        verify(open_images(images, path=place).index, 1)
    assert (tmp_path / "i.arrow.verify").stat().st_size
    assert len(open_images(images, path=place)) == 3


@pytest.mark.parametrize("most", [None, 0, 3, 10, 99])
def test_a_file_is_read_whole_although_the_system_gives_less_at_once(tmp_path, monkeypatch, most):
    path, data = tmp_path / "file", bytes(range(10))
    path.write_bytes(data)
    read = os.read
    monkeypatch.setattr(os, "read", lambda descriptor, size: read(descriptor, min(size, 4)))
    assert read_regular(str(path), most) == data[:most]
