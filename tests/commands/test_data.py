"""`ccmim data`: what each command prints, and how each mistake ends."""

import os
import shlex
import shutil
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_containers import encode, write_tar

from ccmim_fast.cli import main
from ccmim_fast.config.load import load_config
from ccmim_fast.data import shard
from ccmim_fast.data import verify as verify_module
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.index.own import BESIDE
from ccmim_fast.data.stats import measure_stats
from ccmim_fast.data.stream import dali_loader
from ccmim_fast.errors import DataError


@pytest.fixture
def folder(tmp_path, photo_folder, photograph, monkeypatch):
    """22 photographs, one of them cut behind its header, and a text and a CMYK image."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dali_loader, "is_installed", lambda: False)
    root = tmp_path / "photos"
    shutil.copytree(photo_folder, root)
    cut = root / "class0/02.jpg"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (root / "class1/a [b].jpg").write_text("this is no image")
    photograph.convert("CMYK").save(root / "class1/print.jpg")
    return root


@pytest.fixture
def run(capsys):
    """run(argv...): the lines that the command prints; it must end well."""

    def of(*argv):
        assert main(["data", *map(str, argv)]) == 0
        return capsys.readouterr().out.splitlines()

    return of


def cells(lines):
    """The rows of the tables."""
    return [tuple(cell.strip() for cell in line.strip("│").split("│")) for line in lines if line.startswith("│")]


def test_index(folder, run):
    lines = run("index", folder)
    assert lines[0] == "24 samples of 2 classes, 1 of them cannot be used"
    assert cells(lines) == [("RGB", "22"), ("CMYK", "1"), ("unknown", "1"), ("not an image that Pillow knows", "1")]
    path = open_images(str(folder)).index.path
    assert lines[-2:] == [
        f"cannot be used: '{folder}/class1/a [b].jpg': not an image that Pillow knows",
        f"index: {path!r}",
    ]
    assert run("index", folder) == lines


def test_index_sees_a_file_that_was_written_over(folder, run, photograph):
    run("index", folder)
    photograph.save(folder / "class1/a [b].jpg")
    os.utime(folder / "class1")
    lines = run("index", folder)
    assert lines[0] == "24 samples of 2 classes, 0 of them cannot be used"
    watched = os.stat(folder / "class1").st_mtime_ns
    (folder / "class1/a [b].jpg").write_bytes(b"damaged again")
    assert os.stat(folder / "class1").st_mtime_ns == watched
    assert len(open_images(str(folder)).excluded_X) == 0
    assert run("index", folder)[0].endswith("1 of them cannot be used")


def test_index_at_a_place_of_its_own(folder, run, tmp_path):
    place = tmp_path / "deep/er/my.arrow"
    assert run("index", folder, "--index", place)[-1] == f"index: '{place}'"
    assert open_images(str(folder), path=str(place)).index.path == str(place)


def test_verify_lists_what_fails(folder, run, monkeypatch):
    lines = run("verify", folder, "--workers=1")
    assert lines[0] == "24 samples of 2 classes, 2 of them cannot be used"
    assert ("image file is truncated (N bytes not processed)", "1") in cells(lines)
    told = [line for line in lines if line.startswith("cannot be used")]
    assert len(told) == 2
    assert told[0].startswith(f"cannot be used: '{folder}/class0/02.jpg': image file is truncated (")

    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(verify_module, "_decode", refuse)
    assert run("verify", folder, "--workers=1") == lines
    assert run("index", folder)[:-1] == lines


def test_verify_stopped_by_ctrl_c(folder, capsys, monkeypatch):
    monkeypatch.setattr(verify_module, "_CHUNK", 8)
    asked, decode_chunks = [], verify_module._decode_chunks

    def stopping(opener, chunks, processes):
        asked.append(sum(map(len, chunks)))
        for number, done in enumerate(decode_chunks(opener, chunks, processes)):
            if number == 1 and len(asked) == 1:
                raise KeyboardInterrupt
            yield done

    monkeypatch.setattr(verify_module, "_decode_chunks", stopping)
    with pytest.raises(SystemExit) as stopped:
        main(["data", "verify", str(folder), "--workers=1"])
    assert stopped.value.code == 130
    printed = capsys.readouterr()
    assert printed.err == "ccmim: stopped; the same command goes on\n"
    assert main(["data", "verify", str(folder), "--workers=1"]) == 0
    assert capsys.readouterr().out.startswith("24 samples of 2 classes, 2 of them")
    assert asked[0] == 23
    assert asked[1] in (15, 16)  # a chunk less; the last one has 7


def test_long_lists_are_cut_but_by_verify(tmp_path, write_image, run, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "flat"
    root.mkdir()
    write_image(root / "good.png")
    for number in range(30):
        (root / f"{number}.jpg").touch()
    lines = run("index", root)
    assert sum(line.startswith("cannot be used: '") for line in lines) == 20
    assert lines[-2] == "cannot be used: 10 more; ccmim data verify lists all"
    assert lines[0] == "31 samples, 30 of them cannot be used"
    lines = run("verify", root, "--workers=1")
    assert sum(line.startswith("cannot be used: '") for line in lines) == 30


def test_shard(folder, run, tmp_path):
    out = tmp_path / "out"
    lines = run("shard", folder, out, "--side=40", "--shard-bytes=20000", "--workers=2")
    tars = [name for name in os.listdir(out) if name.endswith(".tar")]
    assert lines[0] == f"22 images in {len(tars)} tars; train on them with --data.root='{out}'"
    # What is known as bad, and what is found while it is made smaller.
    assert [line.rpartition(": ")[0] for line in lines[1:]] == [
        f"left out: '{folder}/class1/a [b].jpg'",
        f"left out: '{folder}/class0/02.jpg'",
    ]
    lines = run("index", out)
    assert lines[0] == "22 samples of 2 classes, 0 of them cannot be used"
    assert lines[-1] == f"index: '{out / BESIDE}'"
    assert run("verify", out, "--workers=1")[0] == lines[0]
    assert run("shard", out, tmp_path / "one", "--workers=1")[0].startswith("22 images in 1 tar; ")


def test_a_killed_shard_is_no_set_and_is_begun_anew(folder, run, tmp_path, monkeypatch):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    pid = os.fork()
    if not pid:
        monkeypatch.setattr(shard, "write_index", lambda _, listing, **__: [*listing.rows, os.kill(os.getpid(), 9)])
        main(["data", "shard", str(folder), str(out), "--workers=1", "--shard-bytes=20000"])
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert "shard-000001.tar" in os.listdir(partial / "out")
    with pytest.raises(DataError, match=r"out\.partial' is a folder that a command of ccmim has not finished; run it"):
        open_images(str(partial))
    told = {note.reason for note in open_images(str(tmp_path)).index.notes}
    assert "a folder that a command of ccmim has not finished; run it again" in told
    assert run("shard", folder, out, "--workers=1")[0].startswith("23 images in 1 tar; ")
    assert not partial.exists()


def test_what_is_left_out_is_told_first(folder, run, tmp_path, capsys):
    (folder / "class0/x.heic").touch()
    (folder / "class0/.hidden.jpg").touch()
    (folder / "README").touch()
    for command in (["stats", folder], ["shard", folder, tmp_path / "out"]):
        assert main(["data", *map(str, command), "--workers=1"]) == 0
        printed = capsys.readouterr()
        assert [line.split(";")[0] for line in printed.err.splitlines()] == [
            "1 left out: a format that is not read",
            "1 left out: not an image that Pillow knows",
            "1 not taken: a name that begins with a dot",
            "1 not taken: an unknown ending",
            *(["1 left out: image file is truncated (N bytes not processed)"] if command[0] == "stats" else []),
        ]
    lines = run("index", folder)
    assert lines[0] == "24 samples of 2 classes, 1 of them cannot be used"
    told = lines[
        lines.index("1 left out: a format that is not read; write it as PNG, TIFF or JPEG, an archive as .tar") :
    ]
    assert told[1] == f"  '{folder}/class0/x.heic'"


def test_images_without_a_class_are_counted(folder, run):
    (folder / "loose.jpg").write_bytes((folder / "class0/00.jpg").read_bytes())
    assert run("index", folder)[:2] == [
        "25 samples of 2 classes, 1 of them cannot be used",
        "1 of them have no class: pretraining uses them, an evaluation leaves them out",
    ]


def test_names_and_reasons_cannot_control_the_terminal(folder, run, tmp_path):
    (folder / "class0/\x1b]0;x\x07.jpg").write_text("no image")
    (folder / "\x1b[2J.heic").touch()
    table = pa.table({"a\x1b[31m": [1]})
    pq.write_table(table, tmp_path / "t.parquet")
    for line in run("index", folder):
        assert line.isprintable()
    assert main(["data", "index", str(tmp_path / "t.parquet")]) == 3


def test_which_member_is_the_image_is_a_setting(tmp_path, run):
    members = [(f"{i}.{kind}", encode(i)) for i in range(3) for kind in ("jpg", "seg.png")]
    write_tar(tmp_path / "a.tar", members)
    lines = run("index", tmp_path / "a.tar", "--image-key=seg.png", f"--index={tmp_path}/i.arrow")
    assert lines[0] == "3 samples, 0 of them cannot be used"
    source = open_images(str(tmp_path / "a.tar"), path=f"{tmp_path}/i.arrow", image_key="seg.png")
    assert source.index.location(0) == "0.seg.png"
    assert open_images(str(tmp_path / "a.tar"), path=f"{tmp_path}/i.arrow").index.location(0) == "0.jpg"


def test_stats_are_settings(folder, run):
    lines = run("stats", folder, "--images=10", "--workers=2")
    found = measure_stats(open_images(str(folder)), 10)
    assert lines[0] == f"of {found.images} images:"
    config = load_config(["--data.root=x", *shlex.split(" ".join(lines[1:]))], "test")
    assert config.data.mean == pytest.approx(found.mean_C, abs=6e-5)
    assert config.data.std == pytest.approx(found.std_C, abs=6e-5)


def test_stats_tell_of_images_that_do_not_decode(folder, capsys):
    for path in sorted(folder.glob("class0/*.jpg"))[-2:]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(["data", "stats", str(folder), "--workers=2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("of 20 images:\n")
    last = printed.err.splitlines()[-1]
    assert last.startswith(f"3 left out: image file is truncated (N bytes not processed); the first '{folder}/class")


def test_bench(folder, run):
    lines = run("bench", folder, "--image-size=32", "--batch=8", "--images=8", "--workers=2", "--device=cpu")
    assert [line.split()[0] for line in lines] == ["read", "decode", "crop", "copy", "2", "torch", "milliseconds"]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 2, ["ccmim data: the command is missing", "index, verify, shard, stats, bench, idx, composite"]),
        (["indx"], 2, ["'indx': no such command"]),
        (["index"], 2, ["ccmim data index", "root"]),
        (["verify", "ROOT", "--worker=3"], 2, ["--worker: unknown key; did you mean --workers?"]),
        (["verify", "ROOT", "--workers=-1"], 2, ["--workers: '-1' must be a whole number from 0 on"]),
        (["verify", "ROOT", "--workers=two"], 2, ["--workers: 'two' must be a whole number"]),
        (["stats", "ROOT", "--images=0"], 2, ["--images: '0' must be a whole number from 1 on"]),
        (["stats", "ROOT", "--channels=0"], 2, ["--channels: '0' must be a whole number from 1 on"]),
        (["bench", "ROOT", "--batch=0"], 2, ["--batch: '0' must"]),
        (["bench", "ROOT", "--image-size=0"], 2, ["--image-size: '0' must"]),
        (["bench", "ROOT", "--device=tpu"], 2, ["invalid choice: 'tpu'"]),
        (["bench", "ROOT", "--device=cuda"], 6, ["no CUDA device"]),
        (["shard", "ROOT"], 2, ["ccmim data shard", "out"]),
        (["shard", "ROOT", "NEW", "--side=-1"], 2, ["--side: '-1' must be a whole number from 0 on"]),
        (["shard", "ROOT", "NEW", "--quality=101"], 2, ["--quality: '101' must be a whole number in 1..100"]),
        (["shard", "ROOT", "NEW", "--shard-bytes=0"], 2, ["--shard-bytes: '0' must"]),
        (["shard", "ROOT", "NEW", "--seed=-1"], 2, ["--seed: '-1' must be a whole number in 0..4294967295"]),
        (["shard", "ROOT", "ROOT"], 2, ["is not empty; name a new folder"]),
        (["index", "/nowhere/at/all"], 3, ["no folder '/nowhere/at/all'"]),
        (["index", "ROOT/a-{000..001}.tar"], 3, ["no file", "a-000.tar"]),
        (["index", "ROOT", "--index=ROOT/class0/00.jpg"], 3, ["is no index, and is not written over"]),
        (["stats", "EMPTY"], 3, ["no image in"]),
        (["stats", "ROOT", "--channels=5"], 3, ["nothing in it ends in .npy"]),
    ],
)
def test_mistakes_end_in_one_line(argv, code, words, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "empty").mkdir()
    places = {"ROOT": folder, "EMPTY": tmp_path / "empty", "NEW": tmp_path / "new"}
    for word, place in places.items():
        argv = [argument.replace(word, str(place)) for argument in argv]
    before = (folder / "class0/00.jpg").read_bytes()
    assert main(["data", *argv]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(" left out: " in line for line in printed.err.splitlines()[:-1])
    assert all(word in printed.err for word in words), printed.err
    assert not (tmp_path / "new").exists()
    assert (folder / "class0/00.jpg").read_bytes() == before


@pytest.mark.parametrize("name", ["index", "verify", "shard", "stats", "bench"])
def test_help(name, capsys):
    with pytest.raises(SystemExit) as done:
        main(["data", name, "--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: ccmim data {name} ")
    assert "--channels" in out
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    assert f"\n  {name} " in capsys.readouterr().out
