"""What a set leaves out: it is told with its reason, counts towards data.max_bad, and is looked at again."""

import errno
import json
import os
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_containers import encode, image_table, summary, write_tar
from made_formats import tiff
from PIL import Image

from ccmim_fast.config.load import load_config
from ccmim_fast.data.index import containers, folders, scan
from ccmim_fast.data.index.bad_samples import BadSamples, bad_samples_path
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.index.left_out import LOST, MEANT, Notes, left_out_lines, lost, merged, told
from ccmim_fast.data.index.own import BESIDE, output_of
from ccmim_fast.data.shard import write_shards
from ccmim_fast.errors import DataError
from ccmim_fast.runs import state
from ccmim_fast.runs.folder import describe_run, environment
from ccmim_fast.runs.metrics import Metrics


def write(root, *names):
    """Write one image of each name, all different."""
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(seed, kind="JPEG" if name.lower().endswith((".jpg", ".jfif")) else "PNG"))


def ablation(prefix):
    """Write a drawing of `ablate`, and beside it a table and figures."""
    figures = {"environment": environment(torch.device("cpu")), "runs": []}
    for ending, content in ((".md", b"# a"), (".json", json.dumps(figures, indent=1).encode()), (".png", encode(0))):
        prefix.with_suffix(ending).write_bytes(content)


def locations(source):
    return sorted(location.removeprefix("./") for location, _, reason in summary(source) if not reason)


def test_the_lines_name_the_reason_the_count_and_the_first(tmp_path):
    write(tmp_path, *(f"a/{i}.jpg" for i in range(5)), "loose.png", ".hidden.png", "b.heic", "a/c.cr2")
    (tmp_path / "a/empty.jpg").touch()
    (tmp_path / "a/gone.jpg").symlink_to("nowhere")
    (tmp_path / "README.md").touch()
    source = open_images(str(tmp_path))
    assert left_out_lines(source) == [
        "2 left out: a format that is not read; write it as PNG, TIFF or JPEG, an archive as .tar; "
        f"the first '{tmp_path}/b.heic'",
        f"1 left out: broken link; the first '{tmp_path}/a/gone.jpg'",
        f"1 left out: empty file; the first '{tmp_path}/a/empty.jpg'",
        f"1 not taken: a name that begins with a dot; the first '{tmp_path}/.hidden.png'",
    ]
    assert source.index.lost == 3
    BadSamples(source, "skip", 4 / 10)
    with pytest.raises(DataError, match=r"4 of 10 samples cannot be used, more than data\.max_bad=0\.39"):
        BadSamples(source, "skip", 0.39)


def test_what_begins_as_an_image_counts_whatever_its_name_is(tmp_path):
    pixels = Image.fromarray(np.zeros((6, 7, 3), np.uint8))
    for kind in ("BMP", "DIB", "PPM", "TIFF"):
        pixels.save(tmp_path / kind, kind)
    (tmp_path / "BigTIFF").write_bytes(tiff(np.zeros((6, 7), np.uint8), bigtiff=True))
    (tmp_path / "DICOM").write_bytes(bytes(128) + b"DICM")
    images = sorted(os.listdir(tmp_path))
    for name, content in (("BMX", b"BMX bikes"), ("P1", b"P1 comes first"), ("zeros", bytes(200))):
        (tmp_path / name).write_bytes(content)
    for name in ("x.tbz2", "x.txz", "x.tar.lz4", "x.pef"):
        (tmp_path / name).write_bytes(b"II*\0")
    write(tmp_path, "a.png")
    with tarfile.open(tmp_path / "deep.tar", "w") as tar:
        for name in [*images, "BMX", "P1", "zeros", "x.txz", "a.png"]:
            tar.add(tmp_path / name, name)
    for place, archives in ((tmp_path / "deep.tar", 1), (tmp_path, 4)):
        found = {note.reason.partition(";")[0]: (note.kind, note.count) for note in told(open_images(str(place)))}
        assert found == {
            "an image whose name ends in none of an image's endings": (LOST, len(images)),
            "a format that is not read": (LOST, archives),
            "an unknown ending": (MEANT, 3),
        }
        (tmp_path / "deep.tar").unlink(missing_ok=True)


def test_reasons_and_names_are_printed_as_they_are_safe(tmp_path):
    write(tmp_path, "a.png", "\x1b[31mred.jpg\x07.heic")
    (line,) = left_out_lines(open_images(str(tmp_path)))
    assert line.isprintable()
    assert "\\x1b[31mred.jpg\\x07" in line


def test_many_reasons_end_in_one_line(tmp_path):
    notes = Notes("/r/")
    for number in range(12):
        for _ in range(number + 1):
            notes.add(f"{number}", f"reason {number}", MEANT if number == 11 else LOST)
    found = merged([*notes, *notes])
    assert [note.count for note in found] == [*range(22, 0, -2), 24]  # what may be a loss comes first
    assert lost(found) == 132

    class Index:
        notes, excluded_X = found, np.zeros(0, dtype=np.int64)

    class Source:
        index = Index

    lines = left_out_lines(Source)
    assert len(lines) == 9
    assert lines[-1] == "36 more for 4 other reasons: see ccmim data index"


def test_outputs_of_this_program_are_no_images(tmp_path):
    write(
        tmp_path, *(f"{i}.jpg" for i in range(4)), "runs/a/x.png", "runs/b/deep/y.png", "runs/kept.png", "tables/z.png"
    )
    describe_run(tmp_path / "runs/a", load_config(["--data.root=x"], "test"), torch.device("cpu"))
    (tmp_path / "runs/b/config.yaml").touch()
    Metrics(tmp_path / "runs/b", tensorboard=False).write("train", 1, loss=0.5)
    ablation(tmp_path / "table")
    first = open_images(str(tmp_path), path=str(tmp_path / "index.arrow"))
    assert locations(first) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "runs/kept.png", "tables/z.png"]
    write_shards(first, str(tmp_path / "shards"))
    source = open_images(str(tmp_path), path=str(tmp_path / "index.arrow"))
    assert locations(source) == locations(first)
    assert source.class_names == ("runs", "tables")
    told_of = {note.reason: (note.kind, note.count) for note in told(source)}
    assert told_of == {
        "a run's folder": (MEANT, 2),
        "a folder of shards that ccmim data shard wrote": (MEANT, 1),
        "an output of this program": (MEANT, 2),
    }
    assert source.index.lost == 0
    with pytest.raises(DataError, match=r"runs/a' is a run's folder; set data\.root to a folder of images"):
        open_images(str(tmp_path / "runs/a"))


def test_features_are_no_images(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((6, 7, 5), np.uint8))
    np.save(tmp_path / "features.npy", np.zeros((9, 5), np.float32))
    (tmp_path / "features.jsonl").write_text('{"name": "a.png", "label": 3}\n{"name": "b.png", "label": 0}\n')
    assert locations(open_images(str(tmp_path), channels=5)) == ["a.npy"]


def test_a_run_is_known_by_the_files_that_it_writes(tmp_path):
    describe_run(tmp_path, load_config(["--data.root=x"], "test"), torch.device("cpu"))
    assert output_of(str(tmp_path), {state.CONFIG, state.ENVIRONMENT})
    assert not output_of(str(tmp_path), {state.ENVIRONMENT, "a.jpg"})
    (tmp_path / state.ENVIRONMENT).unlink()
    assert not output_of(str(tmp_path), {state.CONFIG, "a.jpg"})
    state.write_state(tmp_path, state.RunState("running", 1, "here", None))
    assert output_of(str(tmp_path), {state.CONFIG, state.FILE})


def test_images_beside_files_with_the_names_of_outputs_are_images(tmp_path):
    write(tmp_path, "a/p.png", "b/0.png", "b/1.png")
    (tmp_path / "a/p.md").write_text("# A photograph\n")
    (tmp_path / "a/p.json").write_text('{\n "author": "me"\n}\n')
    (tmp_path / "b/config.yaml").write_text("camera: 3\n")
    (tmp_path / "b/metrics.jsonl").write_text('{"step": 1, "sharpness": 0.5}\n')
    assert locations(open_images(str(tmp_path))) == ["a/p.png", "b/0.png", "b/1.png"]
    np.save(tmp_path / "s0.npy", np.zeros((6, 7, 5), np.uint8))
    for line in ('{"caption": "a cat"}\n', '{"name": "s0", "caption": "a cat"}\n', "", "[1]\n", '{"name": '):
        (tmp_path / "s0.jsonl").write_text(line)
        assert locations(open_images(str(tmp_path), channels=5, path=str(tmp_path / "i.arrow"))) == ["s0.npy"]


@pytest.fixture
def locked(monkeypatch):
    """Return a set of base names that nobody may read; the tests may run as root, who may read anything."""
    names = set()

    def guarded(function):
        def call(path, *args, **how):
            if isinstance(path, str) and os.path.basename(path) in names:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return function(path, *args, **how)

        return call

    monkeypatch.setattr(os, "listdir", guarded(os.listdir))
    monkeypatch.setattr(os, "open", guarded(os.open))
    return names


def test_a_folder_that_could_not_be_read_is_read_by_the_next_run(tmp_path, locked):
    write(tmp_path, "a/0.jpg", "b/1.jpg")
    locked.add("b")
    first = open_images(str(tmp_path))
    assert locations(first) == ["a/0.jpg"]
    assert [(note.reason, note.count, note.paths) for note in first.index.notes] == [
        ("Permission denied", 1, (f"{tmp_path}/b",))
    ]
    assert first.index.lost == 1
    before = os.stat(first.index.path).st_ino
    assert open_images(str(tmp_path)).fingerprint == first.fingerprint
    assert os.stat(first.index.path).st_ino == before  # as long as it cannot be read, nothing is written
    locked.clear()
    source = open_images(str(tmp_path))
    assert locations(source) == ["a/0.jpg", "b/1.jpg"]
    assert source.index.notes == []


def test_a_file_that_could_not_be_read_is_read_by_the_next_run(tmp_path, locked):
    write(tmp_path, *(f"{i}.jpg" for i in range(5)))
    locked |= {"1.jpg", "3.jpg"}
    first = open_images(str(tmp_path))
    assert locations(first) == ["0.jpg", "2.jpg", "4.jpg"]
    assert left_out_lines(first) == [f"2 left out: Permission denied; the first '{tmp_path}/1.jpg'"]
    BadSamples(first, "skip", 1.0).add(4, "spoiled")
    assert locations(open_images(str(tmp_path))) == locations(first)
    locked.remove("1.jpg")
    source = open_images(str(tmp_path))
    assert locations(source) == ["0.jpg", "1.jpg", "2.jpg"]  # and what failed meanwhile is in the index
    assert source.sizes_N2[1].tolist() == [8, 9]
    assert source.decode(1).shape == (8, 9, 3)
    assert [reason for _, _, reason in summary(source)] == ["", "", "", "Permission denied", "spoiled"]
    assert not os.path.exists(bad_samples_path(source.index.path))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_container_that_could_not_be_read_is_read_by_the_next_run(tmp_path, locked, kind):
    for number in range(2):
        if kind == "tar":
            write_tar(tmp_path / f"{number}.tar", [(f"{number}.png", encode(number))])
        else:
            pq.write_table(image_table([encode(number)]), tmp_path / f"{number}.parquet")
    locked.add(f"1.{kind}")
    first = open_images(str(tmp_path))
    assert len(first) == 1
    assert left_out_lines(first) == [f"1 left out: Permission denied; the first '{tmp_path}/1.{kind}'"]
    locked.clear()
    assert len(open_images(str(tmp_path))) == 2


def test_a_damaged_place_is_not_read_again(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", [("0.png", encode(0))])
    (tmp_path / "1.tar").write_bytes(b"damaged")
    assert open_images(str(tmp_path)).index.lost == 1
    monkeypatch.setattr(containers, "list_tar", None)
    assert len(open_images(str(tmp_path))) == 1


@pytest.mark.parametrize("origin", ["folder", "url", "tar"])
def test_a_set_is_the_same_set_wherever_it_is(tmp_path, origin):
    taken = ["train/a/0.jpg", "train/a/1.JPG", "train/b/2.jfif", "train/b/x.1.png", "train/b/x.2.png", "train/b/y.jpg"]
    others = [
        "val/a/3.jpg",
        "train/a/._0.jpg",
        "train/.t/4.jpg",
        "train/b/y.seg.png",
        "train/a/5.heic",
        "train/a/n.txt",
    ]
    write(tmp_path / "set", *taken, *others)
    os.link(tmp_path / "set/train/a/0.jpg", tmp_path / "set/train/b/hard.jpg")
    (tmp_path / "set/train/b/link.jpg").symlink_to("../a/0.jpg")
    if origin == "tar":
        with tarfile.open(tmp_path / "set.tar", "w") as tar:
            for name in ("train", "val"):
                tar.add(tmp_path / "set" / name, name)
    source = open_images(
        {"folder": f"{tmp_path}/set", "url": f"file://{tmp_path}/set", "tar": f"{tmp_path}/set.tar"}[origin]
    )
    links = ["train/b/hard.jpg", "train/b/link.jpg"] if origin == "url" else []  # a server says nothing of links
    assert locations(source) == sorted(taken + links)
    assert source.class_names == ("a", "b")
    labels = {location: label for location, label, _ in summary(source)}
    assert [labels[name] for name in taken] == [0, 0, 1, 1, 1, 1]
    assert source.index.lost == 1  # the HEIC file
    hidden = 1 if origin == "folder" else 2  # into a hidden folder nobody looks
    assert sorted(note.count for note in told(source)) == [1, 1, 1, hidden]


def test_containers_lie_at_any_depth(tmp_path):
    for number in range(2):
        (tmp_path / f"set/{number}").mkdir(parents=True)
        write_tar(tmp_path / f"set/{number}/x.tar", [(f"{number}.png", encode(number))])
    for origin in (f"{tmp_path}/set", f"file://{tmp_path}/set"):
        assert locations(open_images(origin)) == ["0.png", "1.png"]
    (tmp_path / "set/2").mkdir()
    write_tar(tmp_path / "set/2/y.tar", [("2.png", encode(2))])
    assert locations(open_images(f"{tmp_path}/set")) == ["0.png", "1.png", "2.png"]


def test_an_index_that_an_older_version_made_beside_shards_is_read(tmp_path):
    """Their class names stand there alone; the notes of the first format were pairs."""
    write(tmp_path / "photos", "a/0.jpg", "b/1.jpg")
    index, _ = write_shards(open_images(str(tmp_path / "photos")), str(tmp_path / "tars"))
    path = tmp_path / "tars" / BESIDE
    old = {**index.metadata, "format": 1, "notes": [["x", "broken link"]]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ccmim_fast.data.index.index_file.FORMAT", 1)
        containers_of = scan.write_table(str(path), scan.table_of(index.rows()), old)
    assert containers_of.metadata["format"] == 1
    source = open_images(str(tmp_path / "tars"))
    assert source.index.path == str(path)
    assert source.class_names == ("a", "b")
    assert [note.reason for note in source.index.notes] == ["broken link"]
    assert json.loads(json.dumps(source.index.metadata))["format"] == 1
    assert folders.list_folder(str(tmp_path / "tars"), 3).containers == index.containers
