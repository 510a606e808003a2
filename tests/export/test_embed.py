"""`ccmim embed`: the rows are the images' features, in the index's order, whatever the batch."""

import errno
import json
import os
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from made_run import make_run
from PIL import Image
from tiny import images

from ccmim_fast.cli import main
from ccmim_fast.export import image_batches
from ccmim_fast.models.tokens import tokens_of


@pytest.fixture
def made(tmp_path):
    """A run, a folder with two classes of images of the run's size, and one that is no image."""
    model, _ = make_run(tmp_path / "run")
    pictures = images(5)
    names = ["a/1.png", "a/2.png", "b/1.png", "b/2.png", "b/3.png"]
    for name, picture in zip(names, pictures):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.numpy()).save(path)
    (tmp_path / "images" / "a" / "0.png").write_text("no image")
    with torch.no_grad():
        tokens = tokens_of(model.encoder, model.mean_C, model.std_C)(pictures)
    return tmp_path, names, tokens


def embedded(folder, out, *options):
    return main(["embed", str(folder / "run"), str(folder / "images"), "--out", str(out), "--device", "cpu", *options])


def same_names(found, names):
    return len(found) == len(names) and all(one.endswith(name) for one, name in zip(found, names))


@pytest.mark.parametrize("batch", ["2", "64"])
def test_npy(made, capsys, batch):
    folder, names, tokens = made
    out = folder / "new" / "features.npy"
    assert embedded(folder, out, "--batch", batch) == 0
    assert "5 x 48; 1 images cannot be used" in capsys.readouterr().out
    found = np.load(out)
    assert found.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found), tokens[:, 1:].mean(1), rtol=0, atol=1e-5)
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert same_names([row["name"] for row in rows], names)
    assert [row["label"] for row in rows] == [0, 0, 1, 1, 1]
    assert sorted(path.name for path in out.parent.iterdir()) == ["features.jsonl", "features.npy"]


def test_arrow(made):
    folder, names, tokens = made
    out = folder / "features.arrow"
    assert embedded(folder, out, "--pool", "cls", "--batch", "2") == 0
    with pa.memory_map(str(out)) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.column_names == ["name", "label", "features"]
    assert same_names(table["name"].to_pylist(), names)
    found = torch.tensor(table["features"].to_pylist())
    torch.testing.assert_close(found, tokens[:, 0], rtol=0, atol=1e-5)


def cut(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("batch", ["1", "64"])
@pytest.mark.parametrize("suffix", [".npy", ".arrow"])
def test_an_image_that_does_not_decode_has_no_row(made, capsys, batch, suffix):
    """Also where it is the whole of a batch."""
    folder, names, tokens = made
    cut(folder / "images" / "b" / "2.png")
    out = folder / "new" / f"features{suffix}"
    assert embedded(folder, out, "--batch", batch) == 0
    said = capsys.readouterr().out
    assert "4 x 48; 2 images cannot be used, the first that does not decode: cannot decode" in said
    assert "b/2.png" in said
    kept = [0, 1, 2, 4]
    if suffix == ".npy":
        found = np.load(out)
        rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    else:
        with pa.memory_map(str(out)) as file:
            rows = pa.ipc.open_file(file).read_all().to_pylist()
        found = np.array([row["features"] for row in rows], np.float32)
    assert same_names([row["name"] for row in rows], [names[i] for i in kept])
    torch.testing.assert_close(torch.from_numpy(found), tokens[kept, 1:].mean(1), rtol=0, atol=1e-5)


def test_what_fails_leaves_nothing(made, capsys):
    folder, *_ = made
    out = folder / "new" / "features.npy"
    for path in (folder / "images").glob("*/[1-3].png"):
        cut(path)
    assert embedded(folder, out, "--batch", "1") == 3
    assert "none of 5 images can be read: cannot decode" in capsys.readouterr().err
    assert not out.parent.exists()


def test_a_disk_without_room_is_told_before_the_first_image(made, capsys, monkeypatch):
    folder, *_ = made
    out = folder / "new" / "features.npy"

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(image_batches, "evaluation_batches", lambda *_, **__: pytest.fail("an image was shown"))
    assert embedded(folder, out) == 6
    assert capsys.readouterr().err.endswith(f"ccmim: {out}: not written: No space left on device\n")
    assert not out.parent.exists()


@pytest.mark.parametrize("suffix", [".npy", ".arrow"])
def test_a_file_that_may_not_grow_is_one_line(made, suffix):
    """The limit of a process, which ends a write as a full disk does; never a signal."""
    folder, *_ = made
    out = folder / "new" / f"features{suffix}"
    # What torch 2.7 writes when it is imported is no matter here.
    code = "import resource, signal, sys; from ccmim_fast import cli; from ccmim_fast.export import embed\n"
    code += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))\n"
    line = ["embed", str(folder / "run"), str(folder / "images"), f"--out={out}", "--device=cpu"]
    assert embedded(folder, folder / "first.npy") == 0  # makes the index
    done = subprocess.run([sys.executable, "-c", code + f"sys.exit(cli.main({line}))"], capture_output=True, text=True)
    assert done.returncode == 6, done.stderr
    assert re.fullmatch(r"ccmim: \S+: not written: .*File too large", done.stderr.splitlines()[-1])
    assert len(done.stderr.splitlines()) == 2  # and what is left out
    assert not out.parent.exists()


def test_another_file_is_not_written_over(made, capsys):
    folder, *_ = made
    (folder / "notes.jsonl").write_text("mine")
    (folder / "folder.npy").mkdir()
    (folder / "pixels.npy").write_text("mine")
    there = {"notes.npy": "notes.jsonl", "folder.npy": "folder.npy", "pixels.npy": "pixels.npy"}
    for name, other in there.items():
        assert embedded(folder, folder / name) == 2
        assert f"{other}' exists; remove it, or name another file" in capsys.readouterr().err
    assert (folder / "notes.jsonl").read_text() == (folder / "pixels.npy").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--out=x.csv"], "must end in .npy or .arrow"), (["--out=x.npy", "--batch=0"], "from 1 on")],
)
def test_mistakes(capsys, options, words):
    assert main(["embed", "run", "images", *options]) == 2
    assert words in capsys.readouterr().err
