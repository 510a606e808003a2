"""Images in tars: labels, refused members, damaged ends, patterns, what changed."""

import io
import os
import tarfile
import threading

import pytest
from made_containers import encode, open_images_again, pixels_of, summary, touch_later, write_tar

from ccmim_fast.data.index import containers, scan, storage
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.index.left_out import MEANT, OTHER
from ccmim_fast.data.index.own import BESIDE
from ccmim_fast.data.shard import write_shards
from ccmim_fast.data.source import usable_count
from ccmim_fast.errors import DataError


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
        assert {note.kind for note in source.index.notes} == {OTHER}  # labels and descriptions
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
    outside = "a name that leads out of the archive"
    assert [reason for _, _, reason in summary(source)] == [
        "",
        outside,
        outside,
        outside,
        "a link that leads to no member of the archive",
        "a device or pipe, not a file",
        "a device or pipe, not a file",
        "not an image that Pillow knows",
    ]
    assert [(note.reason, note.count) for note in source.index.notes] == [("a name that was there before", 1)]
    assert source.class_names == ("c",)
    assert source.encoded(0) == data
    assert usable_count(source) == 1
    assert sorted(os.listdir(tmp_path.parent)) == before  # nothing is unpacked


def test_links_stand_for_the_members_that_they_lead_to(tmp_path):
    """As where the tar is unpacked: a link adds nothing to what is a sample already, but may name what is none."""
    datas = [encode(i) for i in range(4)]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:

        def add(name, content=None, link=None, kind=tarfile.SYMTYPE):
            info = tarfile.TarInfo(name)
            if link is not None:
                info.type, info.linkname = kind, link
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))

        add("b/first.png", link="../store/0")  # what it leads to comes later
        add("store/0", datas[0])
        add("./store/1", datas[1])
        add("a/hard.png", link="store/1", kind=tarfile.LNKTYPE)
        add("a/twice.png", link="hard.png")
        add("a/2.png", datas[2])
        add("b/same.png", link="../a/2.png")
        add("b/hard.png", link="a/2.png", kind=tarfile.LNKTYPE)
        add("b/chain.png", link="./c1")
        add("b/c1", link="c2")
        add("b/c2", link="../store/3")
        add("store/3", datas[3])
        add("b/loop.png", link="loop.png")
        add("b/up.png", link="../../etc/x.png")
        add("b/absolute.png", link="/etc/x.png")
    source = open_images(str(tmp_path / "a.tar"))
    good = {location: source.encoded(n) for n, (location, _, reason) in enumerate(summary(source)) if not reason}
    assert good == {"b/first.png": datas[0], "a/hard.png": datas[1], "a/2.png": datas[2], "b/chain.png": datas[3]}
    assert {location: reason for location, _, reason in summary(source) if reason} == {
        "b/loop.png": "links in a loop",
        "b/up.png": "a link that leads to no member of the archive",
        "b/absolute.png": "a link that leads to no member of the archive",
    }
    assert source.class_names == ("a", "b")


def test_one_key_is_one_sample(tmp_path):
    kinds = ("jpg", "seg.png", "depth.png")
    members = [(f"{i}.{kind}", encode(i * 3 + n)) for i in range(4) for n, kind in enumerate(kinds)]
    write_tar(tmp_path / "a.tar", [*members, *((f"{i}.cls", b"%d " % i) for i in range(4)), ("4.json", b"{}")])
    source = open_images(str(tmp_path))
    assert summary(source) == [(f"{i}.jpg", i, "") for i in range(4)]
    assert [(note.count, note.kind) for note in source.index.notes] == [(5, OTHER), (8, MEANT)]
    chosen = open_images(str(tmp_path), image_key="seg.png")
    assert [(location, label) for location, label, _ in summary(chosen)] == [(f"{i}.seg.png", i) for i in range(4)]
    assert chosen.encoded(2) == encode(7)
    with pytest.raises(DataError, match=r"12 skipped.*a sample without an image: no member of data\.image_key=bmp"):
        open_images(str(tmp_path), image_key="bmp")


def test_a_tar_of_another_kind_within_a_tar_is_told(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", encode(0)), ("b.TAR", b"xx"), ("c.parquet", b"xx"), ("d", encode(1))])
    source = open_images(str(tmp_path / "a.tar"))
    assert [note.reason.split(";")[0] for note in source.index.notes] == [
        "an image whose name ends in none of an image's endings",
        "a tar or table in a tar",
    ]
    assert source.index.lost == 3


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
        assert usable_count(source) == good, name
        assert [source.encoded(n) for n in range(good)] == datas[:good], name
        assert [source.index.location(n) for n in source.excluded_X] == cut, name
        assert all("cut off by the end" in source.index.reason(n) for n in source.excluded_X), name
        assert [note.paths for note in source.index.notes] == [(str(path),)], name
        assert source.index.notes[0].reason.startswith("cut or damaged: "), name


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
    assert source.index.notes[0].reason.startswith("cut or damaged: ")


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
            with pytest.raises(DataError, match="no file"):
                open_images(f"{tmp_path}/{pattern}")
        else:
            source = open_images(f"{tmp_path}/{pattern}")
            assert [row[0] for row in summary(source)] == [f"{number}.png" for number in expected], pattern
            assert [source.encoded(n) for n in range(len(source))] == [encode(number) for number in expected]


def test_only_changed_tars_are_read_again(tmp_path, monkeypatch):
    read, listed = [], []
    header, members = scan.read_header, containers.list_tar
    monkeypatch.setattr(scan, "read_header", lambda *args: (read.append(1), header(*args))[1])
    counted = lambda file, *args, **how: (listed.append(file.name), members(file, *args, **how))[1]  # noqa: E731
    monkeypatch.setattr(containers, "list_tar", counted)
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


def test_the_training_part_of_several_tars_is_that_of_the_folder(tmp_path):
    parts = [["train/a/0.png", "train/a/1.png"], ["train/b/2.png", "val/a/3.png"], ["val/b/4.png"]]
    for number, names in enumerate(parts):
        write_tar(tmp_path / f"part{number}.tar", [(name, encode(int(name[-5]))) for name in names])
    for _ in range(2):
        source = open_images(str(tmp_path))
        assert [row[0] for row in summary(source)] == [*parts[0], parts[1][0]]
        assert source.labels_N.tolist() == [0, 0, 1]
        assert source.class_names == ("a", "b")
        assert [(note.kind, note.count) for note in source.index.notes] == [(MEANT, 1)] * 2
        touch_later(tmp_path / "part0.tar")
    (tmp_path / "part0.tar").unlink()
    (tmp_path / "part1.tar").unlink()
    source = open_images(str(tmp_path))  # what was held out is all that is there now
    assert [row[0] for row in summary(source)] == ["val/b/4.png"]


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


def test_an_index_beside_tars_is_no_table_and_never_overwritten(tmp_path, photo_folder):
    index, _ = write_shards(open_images(str(photo_folder)), str(tmp_path / "shards"))
    beside = tmp_path / "shards" / BESIDE
    written, labels = beside.read_bytes(), index.labels_N.tolist()
    assert open_images(str(tmp_path / "shards")).index.path == str(beside)
    gray = open_images(str(tmp_path / "shards"), channels=1)
    assert len(gray) == len(index) == 22
    assert len(gray.excluded_X) == 0
    assert beside.read_bytes() == written
    beside.unlink()  # the old one is still mapped
    beside.write_bytes(b"damaged")
    source = open_images(str(tmp_path / "shards"))
    assert source.index.containers == index.containers
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
