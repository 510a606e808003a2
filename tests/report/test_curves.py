import json
import math
import re
import xml.etree.ElementTree as ET

import pytest

from ccmim_fast.report import curves
from ccmim_fast.report.curves import COLOURS, curve_svg, line_style, read_metrics


def line(step, **more):
    return {"kind": "train", "step": step, "epoch": step / 10, "loss": 1.0, "recons": 1 / (1 + step), **more}


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def drawn(svg):
    """Points of each curve, in the drawing's units."""
    root = ET.fromstring(svg)
    lines = [
        path.get("d")
        for path in root.iter("path")
        if any(colour.lower() in (path.get("style") or "") for colour in COLOURS)
    ]
    return [[tuple(map(float, p)) for p in re.findall(r"[ML] (\S+) (\S+)", d)] for d in lines]


def test_reads_training_lines_and_tolerates_a_cut_one(tmp_path):
    rows = [line(0), {"kind": "eval", "step": 0, "knn": 0.5}, line(20)]
    path = write(tmp_path / "metrics.jsonl", rows, tail='{"kind": "train", "step": 40, "ep')
    assert read_metrics(path) == [line(0), line(20)]
    assert read_metrics(path, "eval") == [rows[1]]


def test_a_run_that_goes_on_behind_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut = '{"kind": "train", "st'
    path.write_text(json.dumps(line(0)) + "\n" + cut + json.dumps(line(20)) + "\n7\n" + json.dumps(line(40)) + "\n")
    assert read_metrics(path) == [line(0), line(40)]


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    rows = [line(0), line(20), line(40), line(60), line(20, loss=5.0), line(40, loss=5.0)]
    assert read_metrics(write(tmp_path / "metrics.jsonl", rows)) == [rows[0], rows[4], rows[5]]


def test_a_missing_file_is_empty(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_curve_runs_through_its_points():
    """The drawing is an affine map of (epoch, value): three points fix it, all others must follow."""
    rows = [line(step) for step in range(0, 200, 20)]
    (points,) = drawn(curve_svg([("a", rows)], "recons", "Loss", "u"))
    assert len(points) == len(rows)
    (x0, y0), (x9, y9) = points[0], points[-1]
    for row, (x, y) in zip(rows, points):
        assert x == pytest.approx(x0 + (x9 - x0) * row["epoch"] / 18, abs=1e-3)
        slope = (y9 - y0) / (rows[-1]["recons"] - 1)
        assert y == pytest.approx(y0 + slope * (row["recons"] - 1), abs=1e-3)
    assert x9 > x0
    assert y9 > y0  # SVG counts downwards, and the loss falls


def test_a_run_keeps_its_colour_in_every_plot():
    both, one = [line(0, contrast=3.0), line(20, contrast=2.0)], [line(0, contrast=0.0), line(20, contrast=0.0)]
    runs = [("mae", one), ("none", []), ("ccmim", both)]
    svg = curve_svg(runs, "contrast", "Contrast", "u")
    assert len(drawn(svg)) == 1
    assert line_style(2)[0].lower() in svg
    assert line_style(0)[0].lower() not in svg
    assert 'aria-label="Contrast: ccmim"' in svg
    assert len(drawn(curve_svg(runs, "recons", "Loss", "u"))) == 2


def test_styles_differ_between_twelve_runs():
    assert len({line_style(i) for i in range(12)}) == 12


def test_values_that_are_not_finite_are_left_out(monkeypatch):
    monkeypatch.setattr(curves, "POINTS", 3)  # an average with one of them would be lost
    rows = [line(0), line(20, recons=math.nan), line(40, recons=None), line(60, recons=math.inf), line(80), line(90)]
    (points,) = drawn(curve_svg([("a", rows)], "recons", "Loss", "u"))
    assert len(points) == 3


def test_no_curve_no_plot():
    assert curve_svg([("a", [line(0)])], "contrast", "Contrast", "u") is None
    assert curve_svg([], "loss", "Loss", "u") is None


def test_a_single_point_is_visible():
    svg = curve_svg([("a", [line(20)])], "recons", "Loss", "u")
    assert [element.get("href") for element in ET.fromstring(svg).iter("use")]


def test_long_runs_are_averaged_in_groups(monkeypatch):
    monkeypatch.setattr(curves, "POINTS", 4)
    rows = [line(step, recons=1.0 + (step + step // 4) % 2) for step in range(16)]
    (points,) = drawn(curve_svg([("a", rows)], "recons", "Loss", "u"))
    assert len(points) == 4
    assert len({y for _, y in points}) == 1


def test_two_drawings_share_no_id_and_their_references_hold():
    runs = [("line", [line(0), line(20)]), ("dot", [line(0)])]
    one, other = (curve_svg(runs, "recons", "Loss", uid) for uid in ("u", "v"))
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg, known in zip((one, other), ids):
        used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
        assert used
        assert used <= known


def test_drawing_is_an_element_in_the_page_s_colours():
    svg = curve_svg([("<script>&\"'", [line(0), line(20)])], "recons", "Loss", "u")
    assert svg.startswith("<svg ")
    assert "http" not in svg
    assert "<script" not in svg
    assert "currentColor" in svg
    assert "var(--rule)" in svg
    assert ET.fromstring(svg).get("aria-label") == "Loss: <script>&\"'"
    assert svg == curve_svg([("<script>&\"'", [line(0), line(20)])], "recons", "Loss", "u")
