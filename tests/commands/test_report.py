"""`ccmim report`: run folders in any state become one page that asks for nothing."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from html_page import Page
from PIL import Image
from tiny import tiny_config

from ccmim_fast.cli import main
from ccmim_fast.engine.pretraining import fit
from ccmim_fast.report.compare import names_of
from ccmim_fast.runs.state import RunState, write_state

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


def trained(folder: Path, **sections) -> Path:
    settings = {
        "run": {"dir": str(folder), "log_every": 1, "save_every": 1, "tensorboard": False},
        "data": {"source": "shapes", "samples": 12, "workers": 1},
        "train": {"epochs": 3, "batch_size": 6, "device": "cpu", "precision": "fp32"},
        "optim": {"warmup_epochs": 1.0},
    }
    return fit(tiny_config(**{**settings, **sections}))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run with a score bank, and one of MAE."""
    root = tmp_path_factory.mktemp("runs")
    bank = trained(root / "bank", score={"source": "bank"})
    mae = trained(root / "mae", mask={"strategy": "random"}, contrast={"loss": "none"})
    return bank, mae


@pytest.fixture
def copies(ended, tmp_path):
    """The same, to be damaged."""
    return [Path(shutil.copytree(run, tmp_path / "runs" / run.name)) for run in ended]


def page_of(folders, out, *options):
    assert main(["report", *map(str, folders), "--out", str(out), *options]) == 0
    return Page(out.read_text(encoding="utf-8"))


def test_two_runs_side_by_side(ended, tmp_path, capsys):
    page = page_of(ended, tmp_path / "page.html", "--images=2", "--moments=2")
    assert "2 runs" in capsys.readouterr().out
    sections = page.values("section", "id")
    assert sections == ["runs", "curves", "pictures", "differences", "defaults", "environment"]
    assert ["bank", "done", "3.00/3"] in [row[:3] for row in page.rows]
    assert ["contrast.loss", "nce", "none"] in page.rows
    assert ["train.epochs", "800", "3", "3"] in page.rows
    assert any(label.startswith("Images per second: bank, MAE") for label in page.values("svg", "aria-label"))
    # Two checkpoints of each run, the oldest and the newest; MAE has no scores.
    alts = page.values("img", "alt")
    assert [re.findall(r"epoch (\d+): 2 images; columns: (.*)", alt)[0] for alt in alts] == [
        *[(epoch, "image, score, visible, reconstruction") for epoch in "13"],
        *[(epoch, "image, visible, reconstruction") for epoch in "13"],
    ]
    assert "norm_pix" in page.source


def test_the_page_asks_for_nothing(ended, tmp_path):
    page = page_of(ended, tmp_path / "page.html")
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object")]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    sources = page.values("img", "src")
    assert len(sources) == 6
    for source in sources:
        head, data = source.split(",")
        assert re.fullmatch(r"data:image/(png|webp);base64", head)
        Image.open(io.BytesIO(base64.b64decode(data, validate=True))).load()


def test_pictures_follow_the_weights_and_not_the_noise(ended, tmp_path):
    """Of one image at two checkpoints: equal input, another reconstruction."""
    from ccmim_fast.report.snapshots import take_snapshots

    for run in ended:
        before = sorted(run.rglob("*"))
        (first, _, last), remarks = take_snapshots(run, images=3, moments=3)
        assert remarks == []
        assert (first.images_BHWC == last.images_BHWC).all()
        assert (first.reconstruction_BHWC != last.reconstruction_BHWC).any()
        visible = ~last.mask_BL
        assert visible.any(axis=1).all()
        assert last.mask_BL.mean() == pytest.approx(0.75, abs=0.05)
        assert sorted(run.rglob("*")) == before
    assert (first.mask_BL == last.mask_BL).all()  # MAE's masks are noise alone


def test_a_bank_is_read_as_it_was_saved(ended):
    """Scores drawn are those of the maps in the checkpoint, through the crop that is drawn."""
    import torch

    from ccmim_fast.bank.bank import read_maps
    from ccmim_fast.checkpoints import io as checkpoints
    from ccmim_fast.report.snapshots import take_snapshots

    path = checkpoints.checkpoints(ended[0] / "checkpoints")[-1]
    maps_BGG = checkpoints.load(path)["maps"][[0, 11]]
    whole_B4 = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2, dtype=torch.float64)
    scores_BL, share_BL = read_maps(maps_BGG, whole_B4, (4, 6))
    seen = take_snapshots(ended[0], images=2, moments=1)[0][0].scores_BL
    for scores_L, share_L, seen_L in zip(scores_BL, share_BL, torch.from_numpy(seen)):
        known = share_L == 1
        assert known.sum() > 2
        expected_L, found_L = scores_L[known], seen_L.log()[known]
        torch.testing.assert_close(expected_L - expected_L[0], found_L - found_L[0], atol=1e-4, rtol=1e-4)


def test_runs_in_every_state(copies, tmp_path, capsys):
    """Going on with a torn line; no metrics yet; a damaged checkpoint, settings, environment, evaluation."""
    bank, mae = copies
    with open(bank / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 9, "lo')
    write_state(bank, RunState("running", 1, "elsewhere", 0))
    newest = sorted((bank / "checkpoints").glob("step_*"))[-1]
    (newest / "state.pt").write_bytes(b"half")
    (mae / "config.yaml").write_text("a: [1")
    (mae / "environment.json").write_text("{")
    for name, content in (("damaged", '{"figures": 3}'), ("no_picture", '{"figures": {}, "pictures": ["x.png"]}')):
        (mae / "eval" / name).mkdir(parents=True)
        (mae / "eval" / name / "result.json").write_text(content)
    (mae / "eval" / "no_picture" / "x.png").write_bytes(b"no picture")
    (mae / "eval" / "under_way").mkdir()
    young = tmp_path / "runs" / "young"
    young.mkdir()
    shutil.copy(bank / "config.yaml", young)
    (young / "metrics.jsonl").touch()
    page = page_of([bank, mae, young], tmp_path / "page.html", "--images=1")
    rows = {row[0]: row for row in page.rows}
    assert rows["bank"][1] == "running?"
    assert rows["young"][1:4] == ["unknown", "3", "—"]
    assert rows["young"][-1] == "no metrics yet"
    remarks = page.source[page.source.index('id="remarks"') :]
    for name in (newest.name, "config.yaml", "environment.json", "damaged/result.json", "x.png"):
        assert name in remarks[: remarks.index("</section>")]
    assert len(page.values("img", "src")) == 2 + 3
    assert newest.name in capsys.readouterr().out


def test_evaluations(copies, tmp_path):
    """Pictures of outside a folder are not read, whatever a file says."""
    Image.new("RGB", (5, 4)).save(tmp_path / "runs" / "outside.png")
    for run, knn in zip(copies, (0.51239, 0.4)):
        (run / "eval" / "knn_2").mkdir(parents=True)
        content = {"figures": {"k=20": knn}, "chance": 0.25, "step": 7, "protocol": "knn", "source": "<DINO>"}
        content |= {"deviations": [f"crops <of> {run.name}"] if run == copies[0] else [], "evaluation": "knn"}
        (run / "eval" / "knn_2" / "result.json").write_text(json.dumps(content))
    content = {"figures": {}, "pictures": ["../../../outside.png"]}
    (run / "eval" / "x").mkdir()
    (run / "eval" / "x" / "result.json").write_text(json.dumps(content))
    page = page_of(copies, tmp_path / "page.html", "--moments=0")
    assert ["knn_2: k=20", "0.5124", "0.4"] in page.rows
    assert ["knn_2: chance", "0.25", "0.25"] in page.rows
    assert ["knn_2: step", "7", "7"] in page.rows
    told = page.text[page.text.index("bank, knn_2") :]
    assert told.startswith("bank, knn_2 Protocol knn: <DINO> Deviations (protocol’s figure): crops <of> bank")
    assert "MAE, knn_2 Protocol knn: <DINO> Deviations: none." in told
    assert page.values("img", "src") == []


def test_what_ccmim_eval_finds_is_in_the_page(copies, tmp_path):
    """Evaluated by the commands, where they write by themselves: figures, deviations, pictures."""
    run = copies[0]
    few = ["--data.samples=12", "--data.test_samples=12", "--data.image_size=[32,48]", "--train.device=cpu"]
    assert main(["eval", "knn", str(run), "--data.source=shapes", "--knn.k=[3]", *few]) == 0
    assert main(["eval", "masks", str(run), "--moments=2", "--measure=8", "--drawn=2"]) == 0
    page = page_of([run], tmp_path / "page.html", "--moments=0")
    figures = {name: json.loads((run / "eval" / name / "result.json").read_text()) for name in ("knn", "masks")}
    rows = dict(row for row in page.rows if len(row) == 2)
    assert rows["knn: k=3"] == f"{figures['knn']['figures']['k=3']:.4g}"
    assert rows["knn: chance"] == f"{1 / 6:.4g}"
    assert rows["knn: step"] == rows["masks: step"] == "6"
    assert rows["masks: leakage, importance"] == f"{figures['masks']['figures']['leakage, importance']:.4g}"
    assert "knn.k: [3] ([10, 20, 100, 200])" in page.text
    alts = page.values("img", "alt")
    assert alts == ["bank, masks: masks.png", "bank, masks: moments.png"]
    for name, source in zip(("masks.png", "moments.png"), page.values("img", "src")):
        png = base64.b64decode(source.split(",")[1], validate=True)
        assert png == (run / "eval" / "masks" / name).read_bytes()


def test_images_that_are_gone_are_told_of(copies, tmp_path, capsys):
    from ccmim_fast.checkpoints import io as checkpoints

    folder = copies[0] / "checkpoints"
    state = checkpoints.load(checkpoints.checkpoints(folder)[-1])
    state["config"] = state["config"].replace("source: shapes", f"source: images\n  root: {tmp_path / 'gone'}", 1)
    state["config"] = re.sub(r"\n  root: ''", "", state["config"], count=1)
    checkpoints.save(folder, 99, state, keep=1)
    page = page_of(copies[:1], tmp_path / "page.html")
    assert page.values("img", "src") == []
    assert "gone" in capsys.readouterr().out
    # Others may be named; the bank knows nothing of them.
    for i in range(3):
        (tmp_path / "others").mkdir(exist_ok=True)
        Image.new("RGB", (50 + i, 40), (i, 90, 200)).save(tmp_path / "others" / f"{i}.png")
    page = page_of(copies[:1], tmp_path / "page.html", "--data", str(tmp_path / "others"), "--images=2")
    assert len(page.values("img", "src")) == 1


def test_mistakes_are_one_line(ended, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    notes = tmp_path / "notes.html"
    notes.write_text("<!doctype html><p>mine</p>")
    for argv, words in (
        ([], "RUN"),
        (
            [str(ended[0]), "--out", str(notes)],
            "exists and is no page of ccmim report; remove it, or name another file",
        ),
        ([str(ended[0]), "--out", str(ended[0] / "metrics.jsonl")], "exists and is no page of ccmim report"),
        ([str(empty)], "holds no run"),
        ([str(tmp_path / "none")], "no such folder"),
        ([str(ended[0].parent)], str(ended[1])),
        ([str(ended[0]), "--out", str(empty)], str(empty / "report.html")),
        ([str(ended[0]), "--images=-1"], "whole number"),
        ([str(ended[0]), "--nonsense"], "--nonsense"),
    ):
        assert main(["report", *argv]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_names():
    assert names_of([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert names_of([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome")
def test_a_browser_opens_it(ended, tmp_path):
    """Headless: the page is drawn, nothing is written to the console, every picture has its size."""
    out = tmp_path / "page.html"
    page = page_of(ended, out, "--images=2")
    # The page's policy forbids scripts: a copy without it, with every epoch open, says in its title what it drew.
    copy = tmp_path / "copy.html"
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.source).replace("<details", "<details open")
    said = "document.title=[...document.images].map(i=>i.complete&&i.naturalWidth>0).join()"
    copy.write_text(text.replace("</body>", f"<script>onload=()=>{{{said}}}</script></body>"))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    shot = tmp_path / "page.png"
    command = [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}"]
    drawn = subprocess.run(
        [*command, "--window-size=1280,2400", f"--screenshot={shot}", out.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in drawn.stderr
    assert len(Image.open(shot).convert("RGB").getcolors(1 << 24)) > 50
    dumped = subprocess.run([*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120)
    shown = re.search(r"<title>(.*?)</title>", dumped.stdout)[1].split(",")
    assert shown == ["true"] * len(page.values("img", "src"))
