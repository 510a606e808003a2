import base64
import io
import json

import numpy as np
import pytest
import yaml
from html_page import Page
from PIL import Image

from ccmim_fast.report.html import COLUMNS, write_report
from ccmim_fast.report.pictures import Snapshot, snapshot_grid
from ccmim_fast.report.runs import RunView

EPOCHS = (2, 10, 100)  # by name 10 and 100 would come before 2
HOSTILE = "<script>alert('&')</script>\"><img src=x onerror=alert(1)>"
SUMMARY = {
    "methods": {
        "untrained": {"knn": 0.21, "logreg": 0.302, "auroc": 0.5, "leakage": 1.0, "recons": None},
        "mae": {"knn": 0.44, "auroc": 0.63, "auroc_early": 0.49, "leakage": 1.01, "images_per_second": 1311.6},
        "ccmim": {"knn": 0.613, "auroc": 0.86, "leakage": 0.31, "recons": 0.45234, "images_per_second": 84.32},
    },
    "chance": 1 / 6,
    "setting": {"images": 4000, "note": "a & b"},
}


def snapshot(epoch, score):
    rng = np.random.default_rng(epoch)
    return Snapshot(
        epoch,
        rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8),
        rng.random((2, 16), dtype=np.float32) if score else None,
        rng.random((2, 16)) < 0.75,
        rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8),
    )


def made_run(folder, name, score, epochs=EPOCHS):
    folder = folder / name
    for epoch in epochs:
        snapshot(epoch, score).save(folder / "snapshots" / f"epoch_{epoch}.npz")
    lines = []
    for step in range(0, 60, 20):
        losses = {"loss": 2.0 - step / 100, "recons": 1.0 - step / 100, "contrast": float(score)}
        lines.append({"kind": "train", "step": step, "epoch": step / 10, **losses})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "tra')
    config = {"seed": 0, "run": {"dir": str(folder)}, "contrast": {"loss": "nce" if score else "none"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.15.0", "device": "CPU", "git_commit": "94349db"}))
    return RunView(name, folder)


@pytest.fixture
def runs(tmp_path):
    return [made_run(tmp_path, "mae", score=False), made_run(tmp_path, "ccmim", score=True)]


def report(tmp_path, runs, summary=SUMMARY, title="A report"):
    path = tmp_path / "made" / "report.html"
    write_report(path, title, runs, summary)
    return path.read_text(encoding="utf-8")


def test_page_parses_and_shows_every_part(tmp_path, runs):
    page = Page(report(tmp_path, runs))
    assert [a["id"] for a in page.all("section")] == [
        *("results", "curves", "pictures", "differences", "defaults", "environment")
    ]
    assert len(page.all("svg")) == 3
    assert "norm_pix" in page.text
    assert "chance is 16.7%" in page.text
    assert "21.0% (Untrained), 44.0% (MAE), 61.3% (ccMIM)" in page.text
    assert "images 4000" in page.text
    assert page.text.count(" image visible reconstruction") == len(EPOCHS)
    assert page.text.count(" image score visible reconstruction") == len(EPOCHS)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_page_holds_every_picture(tmp_path, runs):
    page = Page(report(tmp_path, runs))
    images = page.all("img")
    assert len(images) == 2 * len(EPOCHS)
    for image, (name, epoch) in zip(images, [(n, e) for n in ("MAE", "ccMIM") for e in EPOCHS]):
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        assert image["alt"].startswith(f"{name}, epoch {epoch}: 2 images")
        png = base64.b64decode(data, validate=True)
        assert png == snapshot_grid(snapshot(epoch, score=name == "ccMIM"))
        columns = 4 if name == "ccMIM" else 3
        assert Image.open(io.BytesIO(png)).size == (columns * 166 - 6, 2 * 166 - 6)


def test_first_and_last_epoch_are_open(tmp_path, runs):
    page = Page(report(tmp_path, runs))
    assert ["open" in a for a in page.all("details")] == [True, False, True] * 2


def test_page_asks_for_nothing(tmp_path, runs):
    text = report(tmp_path, runs)
    page = Page(text)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert not page.all("script")
    links = [a[key] for _, a in page.tags for key in ("src", "href", "xlink:href", "srcset", "data") if key in a]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy


def test_table(tmp_path, runs):
    text = report(tmp_path, runs)
    header, *rows = [row for row in Page(text).rows if len(row) == 1 + len(COLUMNS)]
    assert header[0] == "Method"
    assert [h.split(" ")[-1] for h in header[1:]] == ["↑", "↑", "↑", "↓", "↓", "↑"]
    assert rows == [
        ["Untrained", "21.0%", "30.2%", "0.50", "1.00", "—", "—"],
        ["MAE", "44.0%", "—", "0.63early 0.49", "1.01", "—", "1,312"],
        ["ccMIM", "61.3%", "—", "0.86", "0.31", "0.452", "84.3"],
    ]
    for best in ("61.3%", "0.86", "0.31", "1,312"):
        assert f'class="best">{best}<' in text
    # A single number of its column is no best.
    assert text.count('class="best"') == 4
    for column in COLUMNS:
        assert column.meaning in text


def test_numbers_that_are_not_finite_are_shown_and_never_best(tmp_path):
    methods = {"a": {"recons": float("nan"), "leakage": 0.0}, "b": {"recons": 0.5}, "c": {"recons": 0.4}}
    text = report(tmp_path, [], {"methods": methods})
    assert ">nan<" in text
    assert ">0.00<" in text
    assert 'class="best">0.400<' in text


def test_hostile_text_is_escaped(tmp_path):
    run = made_run(tmp_path, "plain", score=True)
    (run.folder / "config.yaml").write_text(yaml.safe_dump({HOSTILE: HOSTILE}))
    (run.folder / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    other = made_run(tmp_path, "other", score=True)
    summary = {"methods": {HOSTILE: {"knn": 0.5, "leakage": 1.0}}, "setting": {HOSTILE: HOSTILE}}
    text = report(tmp_path, [RunView(HOSTILE, run.folder), other], summary, title=HOSTILE)
    page = Page(text)
    assert "<script" not in text
    assert not [a for _, a in page.tags if "onerror" in a]
    # Title twice, abstract, setting, table, legend, heading, two comparisons.
    assert page.text.count("<script>alert('&')</script>") >= 12
    assert all(a["src"].startswith("data:image/png;base64,") for a in page.all("img"))
    assert any(HOSTILE in a["alt"] for a in page.all("img"))
    assert any(HOSTILE in a["aria-label"] for a in page.all("svg"))


def test_missing_parts_are_left_out(tmp_path):
    page = Page(report(tmp_path, [RunView("gone", tmp_path / "gone")], {}))
    assert page.all("section") == []
    assert page.text.startswith("A report")
    assert "A report" in page.text
    only = made_run(tmp_path, "one", score=False, epochs=(5,))
    (only.folder / "metrics.jsonl").unlink()
    page = Page(report(tmp_path, [only], {"methods": {}}))
    assert [a["id"] for a in page.all("section")] == ["pictures", "defaults", "environment"]
    assert ["open" in a for a in page.all("details")] == [True]


def test_features_have_curves_and_their_last_values(tmp_path, runs):
    """Of a run that has some; MAE's have no alignment, and another run may be older than all looks."""
    looks = [{"kind": "features", "step": s, "epoch": s / 10, "images": 512, "rankme": 10.0 + s} for s in (0, 20, 40)]
    looks[1] |= {"uniformity": None, "lidar_cls": 3.14159}
    with (runs[0].folder / "metrics.jsonl").open("a") as file:
        file.write("\n" + "\n".join(map(json.dumps, looks)) + "\n")
    page = Page(report(tmp_path, runs))
    drawn = [a["aria-label"] for a in page.all("svg")]
    assert [label for label in drawn if "RankMe" in label or "LiDAR" in label] == [
        "RankMe, average: MAE",
        "LiDAR, [CLS]: MAE",
    ]
    assert "Reconstruction loss: MAE, ccMIM" in drawn
    assert not [label for label in drawn if "Alignment" in label or "Uniformity" in label]
    assert [row for row in page.rows if row[0] in ("images", "RankMe, average", "LiDAR, [CLS]")] == [
        ["images", "512"],
        ["RankMe, average", "50"],
    ]


def test_differences_and_environment(tmp_path, runs):
    rows = Page(report(tmp_path, runs)).rows
    assert ["contrast.loss", "none", "nce"] in rows
    assert not [row for row in rows if row[0] in ("seed", "run.dir")]
    # Equal environments share one column.
    assert ["git_commit", "94349db"] in rows
    (runs[0].folder / "environment.json").write_text(json.dumps({"git_commit": "another"}))
    rows = Page(report(tmp_path, runs)).rows
    assert ["git_commit", "another", "94349db"] in rows
    assert ["torch", "—", "2.15.0"] in rows


def test_light_and_dark_and_narrow(tmp_path):
    text = report(tmp_path, [])
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport" content="width=device-width' in text
