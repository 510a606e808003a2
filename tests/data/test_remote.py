"""Images behind URLs: a server on the loopback sends ranges and records the requests."""

import functools
import http.server
import os
import re
import socket
import threading

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.http import HTTPFileSystem
from made_containers import encode, image_table, summary, write_tar

from ccmim_fast.data.index import scan, storage
from ccmim_fast.data.index.index_file import BAD
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.index.left_out import left_out_lines
from ccmim_fast.data.index.own import BESIDE
from ccmim_fast.data.index.storage import Storage
from ccmim_fast.data.source import usable_count
from ccmim_fast.errors import DataError


class Handler(http.server.SimpleHTTPRequestHandler):
    """A server of files by ranges, and of listings as HTML; it records what was asked for and sent."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.translate_path(self.path)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        name = os.path.basename(path.rstrip("/"))
        self.server.headers_asked.append((self.path, self.headers.get("Authorization", "")))
        if name in self.server.silent:
            self.server.silent_until.wait(20)
        if name in self.server.cut:
            self.connection.shutdown(socket.SHUT_RDWR)
        elif name in self.server.refused | self.server.gone:
            self.send_error(503 if name in self.server.refused else 404)
        elif os.path.isdir(path) or not os.path.exists(path):
            super().do_GET()
        else:
            with open(path, "rb") as file:
                data = file.read()
            status, part, where = 200, data, None
            if span and self.server.ranges:
                first, last = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
                status, part, where = 206, data[first : last + 1], f"bytes {first}-{last}/{len(data)}"
            self.server.asked.append((name, bool(span), len(part)))  # before the client goes on with the answer
            self.answer(status, part, where)

    def answer(self, status, data, span):
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
    made.cut, made.gone = set(), set()
    made.headers_asked, made.silent, made.silent_until = [], set(), threading.Event()
    made.folder, made.url = tmp_path / "www", f"http://127.0.0.1:{made.server_port}"
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.silent_until.set()
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


@pytest.mark.parametrize(
    ("fault", "words"), [("cut", ".*[Dd]isconnected"), ("gone", "not found"), ("refused", ".*503")]
)
def test_a_folder_that_a_server_does_not_list_is_no_empty_one(server, fault, words):
    for number, name in enumerate(["ok/c0/0.png", "ok/c1/1.png", "ok/c1/deep/2.png"]):
        (server.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (server.folder / name).write_bytes(encode(number))
    for name in ("c1", "deep", "ok"):
        setattr(server, fault, {name})
        with pytest.raises(DataError, match=rf"^cannot list 'http://.*/{name}': {words}"):
            open_images(f"{server.url}/ok")
    setattr(server, fault, set())
    assert len(open_images(f"{server.url}/ok")) == 3


def test_a_pattern_misses_no_folder_and_takes_a_query(server):
    for number in range(2):
        (server.folder / f"s{number}/deep").mkdir(parents=True)
        write_tar(server.folder / f"s{number}/x.tar", [(f"{number}.png", encode(number))])
    for query in ("", "?token=topsecret"):
        server.gone = {"deep"}  # which is deeper than the pattern
        source = open_images(f"{server.url}/s*/*.tar{query}")
        assert source.index.containers == ["s0/x.tar", "s1/x.tar"]
        assert source.encoded(1) == encode(1)
        server.gone = {"s1"}
        with pytest.raises(DataError, match=r"^cannot list 'http://.*/s1': not found"):
            open_images(f"{server.url}/s*/*.tar{query}", rescan=True)


def test_a_place_that_is_no_folder_is_told_as_that(server, tmp_path):
    (server.folder / "a.png").write_bytes(encode(0))
    (server.folder / "list.txt").write_text("a.png")
    for name in ("a.png", "list.txt"):
        with pytest.raises(DataError, match=rf"'http://.*/{name}'.*; a URL names a folder .*, no image or list"):
            open_images(f"{server.url}/{name}")
    for origin in ("http://127.0.0.1:9/photos", f"{server.url}/nothere", f"file://{tmp_path}/nope"):
        with pytest.raises(DataError, match=r"^cannot list '.*': (not found|No such file.*|.*[Cc]onnect.*); a URL"):
            open_images(origin)
    (tmp_path / "d/a").mkdir(parents=True)
    (tmp_path / "d/a/0.png").write_bytes(encode(0))
    assert open_images(f"file://{tmp_path}/d").class_names == ("a",)


def test_names_and_labels_behind_a_url_are_those_of_the_folder(server):
    names = ["\u00e9/0.png", "A/1.png", "a b/2.png", "a&d/3 x%41.png", "a&d/~.png", "a&d/\u00e9.png", "Z/4#5.png"]
    for number, name in enumerate(names):
        (server.folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (server.folder / "set" / name).write_bytes(encode(number))
    there, here = open_images(f"{server.url}/set"), open_images(str(server.folder / "set"))
    assert there.class_names == here.class_names == ("A", "Z", "a b", "a&d", "\u00e9")
    assert there.labels_N.tolist() == here.labels_N.tolist()
    assert [there.encoded(n) for n in range(7)] == [here.encoded(n) for n in range(7)]


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_folder_with_a_query(server, slash):
    for number, name in enumerate(["a/0.png", "a/1.png", "b/2.png"]):
        (server.folder / "ok" / name).parent.mkdir(parents=True, exist_ok=True)
        (server.folder / "ok" / name).write_bytes(encode(number))
    for folder, count in (("ok", 3), ("ok/a", 2)):
        server.headers_asked.clear()
        source = open_images(f"{server.url}/{folder}{slash}?token=topsecret")
        assert [source.encoded(n) for n in range(len(source))] == [encode(n) for n in range(count)]
        assert source.class_names == (("a", "b") if folder == "ok" else ())
        assert all(path.endswith("?token=topsecret") for path, _ in server.headers_asked)
        assert len(server.headers_asked) < 12
        with open(source.index.path, "rb") as file:
            assert b"topsecret" not in file.read()


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
    with pytest.raises(DataError, match=r"'nonsense://x/?' cannot be read"):
        open_images("nonsense://x")


def test_a_server_without_ranges_is_told(server):
    write_tar(server.folder / "x.tar", [("0.png", encode(0)), ("pad.bin", bytes(11 * 2**20)), ("1.png", encode(1))])
    server.ranges = False
    with pytest.raises(DataError, match="the server sends whole files, not ranges of them") as error:
        open_images(f"{server.url}/x.tar")
    assert "\n" not in str(error.value)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(storage, "_SILENCE", 0.3)
    monkeypatch.setattr(scan, "_TRIED", 4)
    HTTPFileSystem.clear_instance_cache()
    yield
    HTTPFileSystem.clear_instance_cache()


def test_a_server_that_says_nothing_is_one_line(server, impatient):
    write_tar(server.folder / "x.tar", [("0.png", encode(0))])
    server.silent |= {"x.tar"}
    with pytest.raises(DataError, match=r"^cannot read 'http://.*x\.tar': no answer for 0 seconds$"):
        open_images(f"{server.url}/x.tar")
    (server.folder / "x.tar").unlink()
    for number in range(9):
        (server.folder / f"{number}.png").write_bytes(encode(number))
        server.silent.add(f"{number}.png")
    with pytest.raises(DataError, match=r"4 images in a row cannot be read: no answer for 0 seconds"):
        open_images(server.url)


def test_a_server_that_is_not_there_is_no_missing_file():
    with pytest.raises(DataError, match=r"^cannot read 'http://127\.0\.0\.1:9/x\.tar': .*[Cc]onnect") as error:
        open_images("http://ann:hunter2@127.0.0.1:9/x.tar")
    assert "hunter2" not in str(error.value)


class Connecting(AbstractFileSystem):
    """This file system connects when it is made, as those of ftp:// and github:// do."""

    cachable = False

    def __init__(self, *_, **how):
        raise how.get("error") or ConnectionRefusedError(111, "Connection refused")


@pytest.mark.parametrize("origin", ["connecting://ann:hunter2@host/photos", "connecting://ann:hunter2@host/x.tar"])
@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "Connection refused"), RuntimeError("no way")])
def test_a_file_system_that_fails_to_connect_is_one_line_that_names_the_place(monkeypatch, origin, error):
    fsspec.register_implementation("connecting", Connecting, clobber=True)
    monkeypatch.setitem(fsspec.config.conf, "connecting", {"error": error})
    with pytest.raises(DataError, match=rf"'connecting://host.*' cannot be read: {error.args[-1]}$"):
        open_images(origin)


def test_what_a_server_did_not_give_is_asked_for_by_the_next_run(server):
    for number in range(4):
        (server.folder / f"{number}.png").write_bytes(encode(number))
    server.refused |= {"1.png", "2.png"}
    first = open_images(server.url)
    assert usable_count(first) == 2
    (line,) = left_out_lines(first)
    assert line.startswith("2 left out: ClientResponseError: N, message='Service Unavailable'")
    server.refused.remove("2.png")
    server.asked.clear()
    source = open_images(server.url)
    assert [source.index.location(n) for n in source.excluded_X] == ["1.png"]
    assert {name for name, _, _ in server.asked} == {"2.png"}  # and nothing that is known already
    assert source.encoded(2) == encode(2)
    (server.folder / "1.png").unlink()  # gone for good
    server.refused.clear()
    assert open_images(server.url).index.status_N.tolist() == [0, BAD, 0, 0]


def test_a_server_that_fails_within_a_tar_leaves_no_half_of_it(server, monkeypatch):
    skipped = bytes(30 * 2**20)
    write_tar(server.folder / "x.tar", [("0.png", encode(0)), ("large.bin", skipped), ("1.png", encode(1))])
    answer = Handler.answer

    def failing(self, status, data, span):
        if span and int(span.split()[1].split("-")[0]) > 2**20:
            self.send_error(503)
        else:
            answer(self, status, data, span)

    with monkeypatch.context() as patch:
        patch.setattr(Handler, "answer", failing)
        with pytest.raises(DataError, match=r"^cannot read 'http://.*x\.tar': .*503"):
            open_images(f"{server.url}/x.tar")
    assert len(open_images(f"{server.url}/x.tar")) == 2


@pytest.mark.parametrize("kind", ["x.tar", "x.parquet", "photos"])
def test_a_password_is_sent_and_written_nowhere(server, kind):
    (server.folder / "photos").mkdir()
    (server.folder / "photos/0.png").write_bytes(encode(0))
    write_tar(server.folder / "x.tar", [("0.png", encode(0))])
    pq.write_table(image_table([encode(0)]), server.folder / "x.parquet")
    origin = server.url.replace("//", "//ann:hunter2@") + f"/{kind}"
    origin += "" if kind == "photos" else "?token=topsecret"
    source = open_images(origin)
    assert source.encoded(0) == encode(0)
    assert all(found.startswith("Basic ") for _, found in server.headers_asked)
    if kind != "photos":
        assert all(path.endswith("?token=topsecret") for path, _ in server.headers_asked)
    with open(source.index.path, "rb") as file:
        written = file.read() + source.index.path.encode() + source.name(0).encode()
    for secret in (b"ann:", b"hunter2", b"topsecret"):
        assert secret not in written
    server.headers_asked.clear()
    again = open_images(origin.replace("topsecret", "renewed"))  # another signature of the same place
    assert again.fingerprint == source.fingerprint
    assert server.headers_asked == []
    server.refused |= {"x.tar", "0.png"}
    if kind != "x.parquet":
        with pytest.raises(DataError) as error:
            source.decode(0)
        assert not any(secret in str(error.value) for secret in ("ann:", "hunter2", "topsecret"))


def test_hidden_names_and_the_training_part_behind_a_url(server):
    for number, name in enumerate(["train/a/0.png", "train/a/._0.png", "val/a/1.png", "train/b/2.PNG"]):
        (server.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (server.folder / name).write_bytes(encode(number))
    source = open_images(server.url)
    assert [row[:2] for row in summary(source)] == [("train/a/0.png", 0), ("train/b/2.PNG", 1)]
    assert source.class_names == ("a", "b")
    assert source.index.lost == 0
