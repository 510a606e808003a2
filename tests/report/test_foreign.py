"""A run that somebody else made: the report and `eval masks` write where the user says, ask no URL, tell no path."""

import dataclasses
import json
import re

import pytest
from html_page import Page
from made_run import make_run
from PIL import Image
from tiny import images

from ccmim_fast.checkpoints import io
from ccmim_fast.cli import main
from ccmim_fast.config.load import to_yaml
from ccmim_fast.data.index import storage
from ccmim_fast.report.runs import shareable
from ccmim_fast.report.snapshots import own_images

URL = "http://joe:hunter2@example.org/set?token=abc123"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "file_system", lambda url: pytest.fail(f"{url} was asked"))


def made(folder, **data):
    """A run whose settings say where its images are, whatever is there."""
    _, config = make_run(folder)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    state = io.newest(folder / "checkpoints").state | {"config": to_yaml(config)}
    io.save(folder / "checkpoints", 8, state, keep=1)
    (folder / "config.yaml").write_text(to_yaml(config))
    command = f"/home/joe/.venv/bin/ccmim pretrain --data.root={data.get('root', '')}"
    (folder / "environment.json").write_text(json.dumps({"command": command, "commit": "abc123"}))
    return folder


def page_of(run, out, *options):
    """The page's text without the pixels of its pictures, in which any letters may follow each other."""
    assert main(["report", str(run), "--out", str(out), *options]) == 0
    return re.sub('base64,[^"]*', "", out.read_text())


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number, picture in enumerate(images(4)):
        Image.fromarray(picture.numpy()).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


def test_a_url_is_asked_only_if_the_user_names_it(tmp_path, capsys, photos):
    run = made(tmp_path / "run", source="images", root=URL)
    page = page_of(run, tmp_path / "page.html")
    said = capsys.readouterr().out
    assert "they are asked for if you name the URL yourself" in said
    assert main(["eval", "masks", str(run)]) == 3
    said += capsys.readouterr().err
    for secret in ("hunter2", "joe", "abc123&", "token=abc123"):
        assert secret not in said
        assert secret not in page.replace("commit", "")
    assert not (run / "eval").exists()
    assert page_of(run, tmp_path / "page.html", f"--data={photos}").count("data:image") > 0


@pytest.mark.parametrize("command", ["report", "masks"])
@pytest.mark.parametrize("source", ["images", "shapes", "photos"])
def test_nothing_is_written_where_the_run_says(tmp_path, photos, command, source):
    places = {"index": str(tmp_path / "index.arrow"), "root": str(tmp_path / "made")}
    if source == "images":
        places["root"] = str(photos)
    run = made(tmp_path / "run", source=source, samples=8, **places)
    line = (
        ["report", str(run), f"--out={tmp_path / 'page.html'}"] if command == "report" else ["eval", "masks", str(run)]
    )
    assert main(line) == 0
    assert {path.name for path in tmp_path.iterdir()} - {"cache", "photos", "run"} <= {"page.html"}


def test_an_index_that_is_there_is_used(tmp_path, photos):
    """Not another file of this name."""
    index = tmp_path / "index.arrow"
    assert main(["data", "index", str(photos), f"--index={index}"]) == 0
    _, config = make_run(tmp_path / "run")
    data = dataclasses.replace(config.data, source="images", root=str(photos), index=str(index))
    assert own_images(data) == data
    assert own_images(dataclasses.replace(data, root=str(tmp_path))).index == ""
    index.write_text("mine")
    assert own_images(data).index == ""


def test_a_page_holds_no_path_and_no_name_of_a_user(tmp_path, photos):
    run = made(tmp_path / "run", source="images", root=str(photos), index="/home/joe smith/my index.arrow")
    (run / "eval" / "knn").mkdir(parents=True)
    (run / "eval" / "masks").mkdir()
    result = {
        "figures": {"k=1": 0.5},
        "protocol": "knn",
        "source": f"as {photos}",
        "deviations": [f"x: {photos} ({URL})"],
    }
    (run / "eval" / "knn" / "result.json").write_text(json.dumps(result))
    (run / "eval" / "masks" / "result.json").write_text("{")
    page = page_of(run, tmp_path / "page.html")
    assert "k=1" in page
    assert "photos" in page
    for private in (str(tmp_path), "joe", "hunter2", "/home"):
        assert private not in page


def test_names_are_text_in_the_page_and_on_the_terminal(tmp_path, capsys):
    name = "<script>alert(1)</script>\x1b[31m&"
    run = made(tmp_path / name.replace("/", "_"), source="images", root=str(tmp_path / "gone\x1b[31m"))
    page = page_of(run, tmp_path / "page.html", f"--title={name}")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert Page(page).values("script", "src") == []
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/imagenet/train", ".../train"),
        ("/data", ".../data"),
        ("/home/joe smith/my run", ".../my run"),
        ("ccmim x --data.root=/home/joe/set --run.dir /a/b", "ccmim x --data.root=.../set --run.dir .../b"),
        ("'/home/joe/x.jpg': damaged", "'.../x.jpg': damaged"),
        ("~/sets/a", ".../a"),
        ("[/a/b, /c]", "[.../b, .../c]"),
        ("runs/pretrain", "runs/pretrain"),
        ("images/s, 1/2, a / b, and/or", "images/s, 1/2, a / b, and/or"),
        ("s3://bucket/key/part?secret=1", "s3://bucket/key/part?secret=***"),
        ("ViT-B/16, rand-m9-mstd0.5-inc1", "ViT-B/16, rand-m9-mstd0.5-inc1"),
    ],
)
def test_what_is_left_of_a_path(text, shown):
    assert shareable(text) == shown
    assert shareable(shown) == shown
