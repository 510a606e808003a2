"""`ccmim embed`: the rows are the images' features, in the index's order, whatever the batch."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from made_run import make_run
from PIL import Image
from tiny import images

from ccmim_fast.cli import main
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


def test_what_fails_leaves_nothing(made, capsys):
    folder, *_ = made
    good, out = folder / "images" / "b" / "2.png", folder / "new" / "features.npy"
    whole = good.read_bytes()
    good.write_bytes(whole[: len(whole) // 2])
    assert embedded(folder, out, "--batch", "1") == 3
    assert "b/2.png" in capsys.readouterr().err
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--out=x.csv"], "must end in .npy or .arrow"), (["--out=x.npy", "--batch=0"], "from 1 on")],
)
def test_mistakes(capsys, options, words):
    assert main(["embed", "run", "images", *options]) == 2
    assert words in capsys.readouterr().err
