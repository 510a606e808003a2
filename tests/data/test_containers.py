"""Tars, tables and URLs: which samples they hold, what is wrong with them, and how little of them is fetched."""

import functools
import http.server
import io
import json
import os
import re
import tarfile
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ccmim_fast.data import scan, storage
from ccmim_fast.data.index import BESIDE
from ccmim_fast.data.indexed import open_images
from ccmim_fast.data.shard import write_shards
from ccmim_fast.data.source import usable
from ccmim_fast.data.storage import Storage
from ccmim_fast.errors import DataError


def encode(seed, height=8, width=9, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def pixels_of(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def write_tar(path, members, **kwargs):
    """members: (name, bytes or a tar type), in order."""
    with tarfile.open(path, "w", **kwargs) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes) and len(content) > 1:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content, "0.png"
                tar.addfile(info)


def summary(source):
    """(location, label, reason) of each row."""
    labels = [-1] * len(source) if source.labels_N is None else source.labels_N.tolist()
    return [(source.index.location(n), labels[n], source.index.reason(n)) for n in range(len(source))]


def touch_later(path):
    os.utime(path, ns=(time.time_ns() + 10**9,) * 2)


def huggingface(features):
    return {"huggingface": json.dumps({"info": {"features": features}})}


def image_table(datas, labels=None, names=None):
    """As Hugging Face writes it."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"image": pa.array([data if data is None else {"bytes": data, "path": "x"} for data in datas], kind)}
    features = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = {"_type": "ClassLabel", "names": names}
    return pa.table(columns).replace_schema_metadata(huggingface(features))


# Tars


def test_webdataset_labels(tmp_path):
    datas = [encode(i, 8 + i) for i in range(4)]
    write_tar(
        tmp_path / "a.tar",
        [
            ("k0.png", datas[0]),
            ("k0.cls", b" 2"),
            ("k1.cls", b"0\n"),
            ("k1.json", b"{}"),
            ("k1.PNG", datas[1]),
            ("d/k0.png", datas[2]),  # another key than k0
            ("d/k0.cls", b"no number"),
            ("k3.png", datas[3]),
            ("k3.cls", b"99999999999999"),
        ],
    )
    for origin in (tmp_path, tmp_path / "a.tar"):
        source = open_images(str(origin))
        assert summary(source) == [("k0.png", 2, ""), ("k1.PNG", 0, ""), ("d/k0.png", -1, ""), ("k3.png", -1, "")]
        assert source.class_names == ("0", "1", "2")
        assert source.index.notes == []
        for number, data in enumerate(datas):
            assert source.encoded(number) == data
            assert (source.decode(number) == pixels_of(data)).all()
        assert source.name(0) == f"{tmp_path}/a.tar::k0.png"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_class_folders_and_odd_names(tmp_path, form):
    odd = ["./b/caf\u00e9.png", "./a/x\ny.png", "b/latin\udce9.png"]
    odd += [] if form == tarfile.USTAR_FORMAT else ["a/" + "n" * 240 + ".png"]
    datas = [encode(i) for i in range(len(odd))]
    members = [("b", tarfile.DIRTYPE), ("b/folder.png", tarfile.DIRTYPE), *zip(odd, datas)]
    write_tar(tmp_path / "a.tar", members, format=form, encoding="utf-8", errors="surrogateescape")
    source = open_images(str(tmp_path / "a.tar"))
    assert [location for location, _, _ in summary(source)] == odd
    assert source.class_names == ("a", "b")
    assert source.labels_N.tolist() == [1, 0, 1, 0][: len(odd)]
    assert [source.encoded(n) for n in range(len(odd))] == datas


def test_refused_members(tmp_path):
    data = encode(0)
    write_tar(
        tmp_path / "a.tar",
        [
            ("c/0.png", data),
            ("../x.png", data),
            ("c/../../x.png", data),
            ("/etc/x.png", data),
            ("c/link.png", tarfile.SYMTYPE),
            ("c/hard.png", tarfile.LNKTYPE),
            ("c/device.png", tarfile.CHRTYPE),
            ("c/pipe.png", tarfile.FIFOTYPE),
            ("c/0.png", encode(1)),
            ("c/text.png", b"text"),
        ],
    )
    before = sorted(os.listdir(tmp_path.parent))
    source = open_images(str(tmp_path / "a.tar"))
    outside, link = "a name that leads out of the archive", "a link or device, not a file"
    assert [reason for _, _, reason in summary(source)] == [
        "",
        outside,
        outside,
        outside,
        *[link] * 4,
        "a name that was there before",
        "not an image that Pillow knows",
    ]
    assert source.class_names == ("c",)
    assert source.encoded(0) == data
    assert usable(source) == 1
    assert sorted(os.listdir(tmp_path.parent)) == before  # nothing is unpacked


def test_a_cut_tar_is_used_up_to_the_cut_and_the_cut_is_told(tmp_path):
    datas = [encode(i, 40, 40) for i in range(4)]
    path = tmp_path / "a.tar"
    write_tar(path, [(f"{i}.png", data) for i, data in enumerate(datas)])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        third, fourth = tar.getmembers()[2:4]
    cases = {
        "inside data": (third.offset_data + 1000, 2, ["2.png"]),
        "inside padding": (third.offset_data + third.size, 3, []),
        "between members": (fourth.offset, 3, []),
        "inside a header": (fourth.offset + 100, 3, []),
    }
    for name, (length, good, cut) in cases.items():
        path.write_bytes(whole[:length])
        touch_later(path)
        source = open_images(str(path), path=str(tmp_path / f"{name}.arrow"))
        assert usable(source) == good, name
        assert [source.encoded(n) for n in range(good)] == datas[:good], name
        assert [source.index.location(n) for n in source.excluded_X] == cut, name
        assert all("cut off by the end" in source.index.reason(n) for n in source.excluded_X), name
        assert [note[0] for note in source.index.notes] == [str(path)], name
        assert source.index.notes[0][1].startswith("cut or damaged: "), name


@pytest.mark.parametrize("damage", ["header", "negative"])
def test_a_damaged_header_ends_a_tar_and_is_told(tmp_path, damage):
    path = tmp_path / "a.tar"
    write_tar(path, [(f"{i}.png", encode(i)) for i in range(4)])
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        place = tar.getmembers()[2].offset
    header = content[place : place + 512]
    if damage == "header":
        header[:8] = b"\xff" * 8
    else:  # by which a reader that trusts it goes back, for ever
        header[124:136] = b"\xff" * 10 + (-512 & 0xFFFF).to_bytes(2, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    content[place : place + 512] = header
    path.write_bytes(content)
    source = open_images(str(path))
    assert [location for location, _, reason in summary(source) if not reason] == ["0.png", "1.png"]
    assert source.index.notes[0][1].startswith("cut or damaged: ")


def test_patterns(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "table.parquet").mkdir()
    for number, name in enumerate(("in/s-008.tar", "in/s-009.tar", "in/s-010.tar", "b[1].tar", "table.parquet/x.tar")):
        write_tar(tmp_path / name, [(f"{number}.png", encode(number))])
    for pattern, expected in {
        "in/s-{008..010}.tar": [0, 1, 2],
        "in/s-{9..9}*.tar": None,
        "in/s-0{09..10}.tar": [1, 2],
        "in/s-*.tar": [0, 1, 2],
        "in/s-00?.tar": [0, 1],
        "*/s-010.tar": [2],
        "b[1].tar": [3],
        "table.parquet": [4],
        "in/s-{010..012}.tar": None,
    }.items():
        if expected is None:
            with pytest.raises(DataError, match="no file '"):
                open_images(f"{tmp_path}/{pattern}")
        else:
            source = open_images(f"{tmp_path}/{pattern}")
            assert [row[0] for row in summary(source)] == [f"{number}.png" for number in expected], pattern
            assert [source.encoded(n) for n in range(len(source))] == [encode(number) for number in expected]


def test_only_changed_tars_are_read_again(tmp_path, monkeypatch):
    read, listed = [], []
    header, members = scan.read_header, scan.read_members
    monkeypatch.setattr(scan, "read_header", lambda *args: (read.append(1), header(*args))[1])
    monkeypatch.setattr(scan, "read_members", lambda file, *args: (listed.append(file.name), members(file, *args))[1])
    for name in "bd":
        write_tar(tmp_path / f"{name}.tar", [(f"{name}{i}/x.png", encode(i)) for i in range(2)])
    assert open_images(str(tmp_path)).class_names == ("b0", "b1", "d0", "d1")
    assert (len(read), len(listed)) == (4, 2)
    assert open_images(str(tmp_path)).labels_N.tolist() == [0, 1, 2, 3]
    assert (len(read), len(listed)) == (4, 2)
    write_tar(tmp_path / "a.tar", [("c/y.png", encode(5))])
    source = open_images(str(tmp_path))
    assert (len(read), len(listed)) == (5, 3)
    assert source.class_names == ("b0", "b1", "c", "d0", "d1")  # classes of old and new tars together
    assert source.labels_N.tolist() == [2, 0, 1, 3, 4]
    assert source.index.containers_N.tolist() == [0, 1, 1, 2, 2]
    (tmp_path / "b.tar").unlink()
    assert [row[0] for row in summary(open_images(str(tmp_path)))] == ["c/y.png", "d0/x.png", "d1/x.png"]
    assert len(read) == 5


def test_a_tar_that_changes_later_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}.png", encode(i, 90)) for i in range(3)])
    source = open_images(str(tmp_path / "a.tar"))
    os.truncate(tmp_path / "a.tar", int(source.index.offsets_N[1]) + 10)
    assert source.encoded(0) == encode(0, 90)
    with pytest.raises(DataError, match=r"a\.tar::1\.png' has 10 bytes, and \d+ when it was indexed"):
        source.decode(1)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read '.*a\.tar::1\.png': No such file"):
        open_images_again(source).decode(1)


def open_images_again(source):
    """Another process's view: no file is open."""
    return type(source)(source.index)


def test_an_index_beside_tars_is_no_table_and_never_overwritten(tmp_path, photo_folder):
    made = write_shards(open_images(str(photo_folder)), str(tmp_path / "shards"))
    beside = tmp_path / "shards" / BESIDE
    written, labels = beside.read_bytes(), made.index.labels_N.tolist()
    assert open_images(str(tmp_path / "shards")).index.path == str(beside)
    gray = open_images(str(tmp_path / "shards"), channels=1)
    assert len(gray) == len(made.index) == 22
    assert len(gray.excluded_X) == 0
    assert beside.read_bytes() == written
    beside.unlink()  # the old one is still mapped
    beside.write_bytes(b"damaged")
    source = open_images(str(tmp_path / "shards"))
    assert source.index.containers == made.index.containers
    assert source.labels_N.tolist() == labels


def test_files_dropped_from_the_open_ones_are_not_mixed_up(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_OPEN", 2)
    for number in range(6):
        write_tar(tmp_path / f"{number}.tar", [("x.png", encode(number, 20))])
    source = open_images(str(tmp_path))
    expected = [encode(number, 20) for number in range(6)]
    faults = []

    def read(start):
        for step in range(300):
            number = (start + step * (1 + start)) % 6
            try:
                if source.encoded(number) != expected[number]:
                    faults.append(number)
            except DataError as error:
                faults.append(str(error))

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


# Tables


def test_hugging_face_parquet(tmp_path):
    datas = [encode(i, 10 + i) for i in range(7)]
    table = image_table(datas, [2, 0, 1, None, 2, -1, 0], ["ant", "bee", "cat"])
    pq.write_table(table, tmp_path / "train-0.parquet", row_group_size=3)
    pq.write_table(image_table([encode(9)], [1], ["ant", "bee", "cat"]), tmp_path / "train-1.parquet")
    source = open_images(str(tmp_path))
    assert source.class_names == ("ant", "bee", "cat")
    assert source.labels_N.tolist() == [2, 0, 1, -1, 2, -1, 0, 1]
    assert source.sizes_N2[:, 0].tolist() == [*range(10, 17), 8]
    assert [source.encoded(n) for n in (6, 0, 7, 3)] == [datas[6], datas[0], encode(9), datas[3]]
    assert source.name(4) == f"{tmp_path}/train-0.parquet::row 4"


@pytest.mark.parametrize("kind", ["parquet", "file", "stream", "feather"])
@pytest.mark.parametrize("column", ["plain", "struct"])
def test_kinds_of_tables(tmp_path, kind, column):
    datas = [encode(0), None, b"", b"text", encode(4)]
    if column == "struct":
        table = image_table(datas)
    else:
        table = pa.table({"id": [1, 2, 3, 4, 5], "jpg": pa.array(datas, pa.large_binary()), "label": ["a"] * 5})
    path = tmp_path / f"t.{'parquet' if kind == 'parquet' else 'feather' if kind == 'feather' else 'arrow'}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
    elif kind == "feather":
        feather.write_feather(table, path, compression="uncompressed")
    else:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    source = open_images(str(path))
    assert [reason for _, _, reason in summary(source)] == [
        "",
        "empty file",
        "empty file",
        "not an image that Pillow knows",
        "",
    ]
    assert source.labels_N is None  # of text no numbers are made
    assert source.encoded(0) == datas[0]
    assert (source.decode(4) == pixels_of(datas[4])).all()


def test_labels_that_are_no_classes_are_left_out(tmp_path):
    table = pa.table({"image": [encode(0), encode(1)], "label": [2**40, -7]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert open_images(str(tmp_path)).labels_N is None


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_unusable_tables_are_told(tmp_path, kind):
    good = tmp_path / f"good.{kind}"
    feather.write_feather(pa.table({"x": [1]}), tmp_path / "numbers.feather")
    pq.write_table(image_table([encode(0)]), tmp_path / "ok.parquet")
    pq.write_table(image_table([encode(0)]), good) if kind == "parquet" else feather.write_feather(
        image_table([encode(0)]), good
    )
    (tmp_path / f"cut.{kind}").write_bytes(good.read_bytes()[:-30])
    (tmp_path / f"empty.{kind}").touch()
    (tmp_path / f"folder.{kind}").mkdir()
    pq.write_table(image_table([encode(0)]).replace_schema_metadata({"huggingface": "{"}), tmp_path / "meta.parquet")
    source = open_images(str(tmp_path))
    told = {os.path.basename(path): reason for path, reason in source.index.notes}
    assert told.keys() == {"numbers.feather", f"cut.{kind}", f"empty.{kind}", f"folder.{kind}"}
    assert "no column of bytes among x" in told["numbers.feather"]
    assert "\n" not in "".join(told.values())
    assert usable(source) == 3
    with pytest.raises(DataError, match=r"no image in .*cut.*: 1 skipped, the first '.*cut\..*is no table of images"):
        open_images(f"{tmp_path}/cut.{kind}")


def test_a_table_that_changes_later_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    datas = [encode(i, 30, 30) + rng.bytes(2000) for i in range(6)]
    pq.write_table(image_table(datas), path, row_group_size=2, compression="none", use_dictionary=False)
    source = open_images(str(path))
    content = bytearray(path.read_bytes())
    place = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content[place : place + 20] = b"\xff" * 20
    path.write_bytes(content)
    source = open_images_again(source)
    assert source.encoded(0) == datas[0]
    assert source.encoded(5) == datas[5]
    with pytest.raises(DataError, match=r"a\.parquet::row 2' row group 1 cannot be read: ") as error:
        source.decode(2)
    assert "\n" not in str(error.value)
    pq.write_table(image_table(datas[:3]), path)
    with pytest.raises(DataError, match=r"a\.parquet::row 5' is beyond the 3 rows of its table"):
        open_images_again(source).decode(5)
    path.write_text("no table")
    with pytest.raises(DataError, match=r"a\.parquet::row 5' .* is no table of images"):
        open_images_again(source).decode(5)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read '.*a\.parquet::row 5': .*No such file"):
        open_images_again(source).decode(5)


def test_a_table_is_read_alike_by_threads_and_by_a_copy_of_the_process(tmp_path):
    datas = [encode(i, 30) for i in range(40)]
    pq.write_table(image_table(datas), tmp_path / "a.parquet", row_group_size=2)
    source = open_images(str(tmp_path))
    assert source.encoded(0) == datas[0]
    pid = os.fork()
    right = all(source.encoded(n) == datas[n] for n in range(40) for _ in range(3))
    if not pid:
        os._exit(0 if right else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert right


# URLs


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files with range requests, and listings as HTML; keeps account of what was asked for and sent."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.translate_path(self.path)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        name = os.path.basename(path)
        if name in self.server.refused:
            self.send_error(503)
        elif os.path.isdir(path) or not os.path.exists(path):
            super().do_GET()
        else:
            with open(path, "rb") as file:
                data = file.read()
            if span and self.server.ranges:
                first, last = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
                self.answer(206, data[first : last + 1], f"bytes {first}-{last}/{len(data)}")
            else:
                self.answer(200, data, None)
            self.server.asked.append((name, bool(span), self.sent))

    def answer(self, status, data, span):
        self.sent = len(data)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "www"))
    made.daemon_threads = True
    made.handle_error = lambda *_: None  # the client may have heard enough
    made.asked, made.refused, made.ranges = [], set(), True
    made.folder, made.url = tmp_path / "www", f"http://127.0.0.1:{made.server_port}"
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_of_a_remote_tar_only_what_is_needed_is_fetched(server):
    datas = [encode(i, 60, 60) for i in range(3)]
    skipped = bytes(30 * 2**20)  # longer than what is read ahead at once
    members = [("a/0.png", datas[0]), ("a/large.bin", skipped), ("b/1.png", datas[1]), ("b/2.png", datas[2])]
    write_tar(server.folder / "x.tar", members)
    source = open_images(f"{server.url}/x.tar")
    assert [row[:2] for row in summary(source)] == [("a/0.png", 0), ("b/1.png", 1), ("b/2.png", 1)]
    assert all(ranged for _, ranged, _ in server.asked)
    assert sum(sent for _, _, sent in server.asked) < 12 * 2**20
    server.asked.clear()
    assert source.encoded(1) == datas[1]
    assert server.asked == [("x.tar", True, len(datas[1]))]
    server.asked.clear()
    assert open_images(f"{server.url}/x.tar").fingerprint == source.fingerprint
    assert server.asked == []  # the index is kept
    assert source.name(0) == f"{server.url}/x.tar::a/0.png"
    assert Storage(server.url, ["x.tar"]).read("", 0, 512, 0) == b""


def test_remote_parquet(server):
    rng = np.random.default_rng(0)
    datas = [encode(i) + rng.bytes(2**20) for i in range(12)]
    pq.write_table(image_table(datas, [0, 1] * 6, ["a", "b"]), server.folder / "x.parquet", row_group_size=1)
    source = open_images(f"{server.url}/x.parquet")
    assert source.labels_N.tolist() == [0, 1] * 6
    assert source.class_names == ("a", "b")
    assert [source.encoded(n) for n in (11, 3)] == [datas[11], datas[3]]
    assert all(ranged for _, ranged, _ in server.asked)


@pytest.mark.parametrize("classes", [False, True])
def test_remote_folder(server, classes):
    names = ["b/1 a.png", "a/0.png", "b/2.jpg"] if classes else ["1 a.png", "0.png", "2.jpg"]
    for number, name in enumerate(names):
        path = server.folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(number, 10 + number, kind="JPEG" if name.endswith("jpg") else "PNG"))
    (server.folder / "photos" / names[0]).with_name("empty.png").touch()
    (server.folder / "photos" / "notes.txt").write_text("no image")
    source = open_images(f"{server.url}/photos")
    assert [reason != "" for _, _, reason in summary(source)].count(True) == 1
    found = {source.index.location(n).replace("%20", " "): source.encoded(n) for n in range(len(source))}
    assert [found[name] for name in names] == [(server.folder / "photos" / name).read_bytes() for name in names]
    assert source.class_names == (("a", "b") if classes else ())
    (server.folder / "photos" / names[1]).unlink()
    gone = next(n for n in range(len(source)) if source.index.location(n) == names[1])
    with pytest.raises(DataError, match=r"cannot read 'http://.*0\.png'"):
        source.decode(gone)


def test_remote_folder_and_pattern_of_tars(server):
    for number in range(3):
        (server.folder / str(number)).mkdir()
        write_tar(server.folder / str(number) / "x.tar", [(f"{number}.png", encode(number))])
    (server.folder / BESIDE).write_bytes(b"no table of images")
    for origin in ("", "{0..2}/x.tar", "*/x.tar"):
        source = open_images(f"{server.url}/{origin}")
        assert [row[0] for row in summary(source)] == ["0.png", "1.png", "2.png"], origin
        assert source.index.containers == ["0/x.tar", "1/x.tar", "2/x.tar"]
        assert source.encoded(1) == encode(1)
        assert source.index.notes == []


def test_faults_of_the_other_side_are_one_line(server):
    for number in range(3):
        (server.folder / f"{number}.png").write_bytes(encode(number, 60, 60))
    write_tar(server.folder / "x.tar", [("0.png", encode(0))])
    server.refused.add("1.png")
    with pytest.raises(DataError, match=r"^cannot read 'http://.*gone\.tar': not found$"):
        open_images(f"{server.url}/gone.tar")
    source = open_images(f"{server.url}/x.tar")
    server.refused.add("x.tar")
    with pytest.raises(DataError, match=r"cannot read 'http://.*x\.tar::0\.png': .*503"):
        source.decode(0)
    with pytest.raises(DataError, match=r"^cannot read 'http://.*x\.tar': .*503"):
        open_images(f"{server.url}/x.tar", channels=1)
    (server.folder / "x.tar").unlink()
    source = open_images(server.url)
    assert [source.index.reason(n)[:19] for n in range(3)] == ["", "ClientResponseError", ""]
    with pytest.raises(DataError, match=r"(no image in|cannot list) 'http://.*/nowhere'"):
        open_images(f"{server.url}/nowhere")
    with pytest.raises(DataError, match="'nonsense://x' cannot be read"):
        open_images("nonsense://x")


def test_a_server_without_ranges_is_told(server):
    write_tar(server.folder / "x.tar", [("0.png", encode(0)), ("pad.bin", bytes(11 * 2**20)), ("1.png", encode(1))])
    server.ranges = False
    with pytest.raises(DataError, match="the server sends whole files, not ranges of them") as error:
        open_images(f"{server.url}/x.tar")
    assert "\n" not in str(error.value)
