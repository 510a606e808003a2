"""What a path, a pattern or a URL of tars names, without looking into them."""

import os

import pytest
from made_containers import encode, write_tar

from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.index.origin import _expand_braces, find_origin
from ccmim_fast.data.index.storage import join
from ccmim_fast.errors import DataError


@pytest.mark.parametrize(
    "origin",
    ["s3://bucket-{0..1}/x.tar", "s3://b/p/{8..10}.tar", "s3://b/p//x.tar", "https://host//a/x.tar", "memory://x.tar"],
)
def test_urls_of_containers_stay_what_they_are(origin):
    """Also where they share the scheme alone, and with an empty part, which is one of a key of S3."""
    found = find_origin(origin, 3)
    assert [join(found.root, path) for path in found.containers] == _expand_braces(origin)


def test_a_root_with_two_slashes(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"")
    found = find_origin(f"/{tmp_path}/x.tar", 3)
    assert [os.path.realpath(join(found.root, path)) for path in found.containers] == [str(tmp_path / "x.tar")]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("x-{0..99999999}.tar", "names 100,000,000 files, more than 500,000; narrow its ranges"),
        ("{0..999}/x-{0..999}.tar", "names 1,000,000 files"),
        ("https://h/x-{0..99999999999999999999999}.tar", "more than 500,000"),
        ("x-{5..2}.tar", "names no file"),
    ],
)
def test_a_pattern_of_too_many_files_is_one_line(pattern, words):
    with pytest.raises(DataError, match=words):
        find_origin(pattern, 3)


@pytest.mark.parametrize("name", ["list.txt", "x.tar", "t.parquet", "train2018.json", "pipe"])
def test_a_pipe_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=r"not a regular file"):
        find_origin(str(tmp_path / name), 3)
    (tmp_path / "x.png").touch()
    assert find_origin(str(tmp_path), 3).rows[0].location == b"x.png"


def test_pipes_among_images_are_told(tmp_path):
    for name in ("0.png", "1.png", "2.tar"):
        os.mkfifo(tmp_path / name)
    found = find_origin(str(tmp_path), 3)
    assert [row.reason for row in found.rows] == ["not a regular file"] * 2
    assert [note.count for note in found.notes] == [1]


def read(tmp_path, data):
    (tmp_path / "list.txt").write_bytes(data)
    return [(row.location, row.reason) for row in find_origin(str(tmp_path / "list.txt"), 3).rows]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_of_lists(tmp_path, encoding):
    (tmp_path / "caf\u00e9.png").touch()
    assert read(tmp_path, "caf\u00e9.png\r\n".encode(encoding)) == [("caf\u00e9.png".encode(), None)]


@pytest.mark.parametrize("data", ["x.png\n".encode("utf-16-le"), b"\xff\xfex", b"a\0.png"])
def test_lists_that_are_no_text_are_one_line(tmp_path, data):
    with pytest.raises(DataError, match=r"cannot read the list '.*list\.txt'.*write it as UTF-8"):
        read(tmp_path, data)


def test_what_a_list_cannot_name(tmp_path):
    (tmp_path / "other.txt").write_text("x.png")
    reasons = [reason for _, reason in read(tmp_path, b"list.txt\nother.txt\nx.tar\n.\n")]
    assert [reason.split(";")[0] for reason in reasons] == [
        "a list in a list",
        "a list in a list",
        "a tar or table among images, with a class, or behind a URL",
        "a folder, not an image",
    ]


def test_a_list_names_tars_and_tables_of_all_parts(tmp_path):
    """Each once, in the order of the lines; of a folder of the same tars the training part alone is taken."""
    for name in ("train-0.tar", "train-1.tar", "val.tar"):
        part = name.partition("-")[0].removesuffix(".tar")
        write_tar(tmp_path / name, [(f"{part}/{name[:-4]}.png", encode(len(name)))])
    (tmp_path / "lists").mkdir()
    place = tmp_path / "lists" / "all.txt"
    place.write_text(f"../val.tar\r\n{tmp_path}/train-{{0..1}}.tar\n../train-*.tar\n")
    source = open_images(str(place))
    found = [os.path.basename(source.index.location(n)) for n in range(len(source))]
    assert found == ["val.png", "train-0.png", "train-1.png"]
    assert source.index.notes == []
    assert source.decode(0).shape == (8, 9, 3)
    assert len(open_images(str(tmp_path))) == 2
    write_tar(tmp_path / "train-2.tar", [("2.png", encode(2))])
    assert len(open_images(str(place))) == 4
    place.write_text("../val.tar\n../gone.tar\n")
    with pytest.raises(DataError, match=r"no file '.*gone\.tar'"):
        open_images(str(place))


@pytest.mark.parametrize("line", ["x.tar\tcat", "https://host/x.tar"])
def test_what_a_list_of_tars_cannot_name(tmp_path, line):
    (reason,) = [reason for _, reason in read(tmp_path, line.encode())]
    assert reason.endswith("name tars and tables in a list of their own")
