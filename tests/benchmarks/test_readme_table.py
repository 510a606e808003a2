"""The README's performance tables are those of the newest committed results."""

import json

import pytest


@pytest.fixture
def readme_table(module):
    return module("readme_table")


def test_the_readme_is_up_to_date(readme_table):
    readme = readme_table.README.read_text()
    assert readme_table.rewritten(readme, readme_table.region(readme_table.newest())) == readme, (
        "run python benchmarks/readme_table.py"
    )


def test_newest_of_each_kind_of_device_and_precision(readme_table, tmp_path, monkeypatch):
    """Only what git knows of counts."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for name, device, precision, time in [
        ("a", "cpu, 4 cores", "fp32", "11-01"),
        ("b", "cpu, 2 cores", "fp32", "11-02"),
        ("c", "cpu, 4 cores", "bf16", "11-01"),
        ("d", "NVIDIA H100", "bf16", "10-01"),
    ]:
        row = {"environment": {"device": device, "time": time}, "precision": precision}
        (results / f"throughput-{name}.json").write_text(json.dumps(row))
    monkeypatch.setattr(readme_table, "ROOT", tmp_path)
    git = ["git", "-C", str(tmp_path)]
    readme_table.subprocess.run([*git, "init", "-q"], check=True)
    assert readme_table.newest() == []
    readme_table.subprocess.run([*git, "add", "."], check=True)
    assert [path.stem for path in readme_table.newest()] == ["throughput-b", "throughput-c", "throughput-d"]


def test_marks(readme_table):
    marked = f"before\n{readme_table.BEGIN}old\n{readme_table.END}after\n"
    assert readme_table.rewritten(marked, "new\n") == marked.replace("old", "new")
    with pytest.raises(ValueError, match="must both be there"):
        readme_table.rewritten("no marks", "new")


def test_a_section(readme_table, tmp_path, monkeypatch):
    monkeypatch.setattr(readme_table, "ROOT", tmp_path)
    over = {"median": 2.0, "min": 1.5, "max": 2.5}
    row = {"name": "mae-8", "images_per_second": over, "ratios": {"lightly": over}, "peak_bytes": 3e9}
    row |= {"gflop_per_image": 57.84, "mfu": 0.7}
    environment = {"device": "cpu", "threads": "2", "torch": "2.15", "commit": "abc", "time": "2026-11-24T10:00:00"}
    size = {"arch": "vit_base_patch16_224", "image_size": 224, "batch": 16, "precision": "fp32"}
    path = tmp_path / "throughput-x.json"
    path.write_text(
        json.dumps({"environment": environment, **size, "rows": [row, {"name": "x", "error": "out of memory"}]})
    )
    section = readme_table.section(path)
    assert section.splitlines()[-3] == "| step | img/s | x lightly | peak GB | GFLOP/img | MFU |"
    assert section.splitlines()[-1] == "| mae-8 | 2.00 (1.50..2.50) | 2.00 | 3.00 | 57.8 | 70% |"
    assert "[all figures](throughput-x.md)" in section
    peer = row | {"name": "lightly", "ratios": {"mae-8": over}, "form": {"form": {"weights": "bf16", "compile": "off"}}}
    old = row | {"name": "mae-8@abc", "ratios": {}, "commit": "abc" * 10}
    half = over | {"median": 0.5}
    ours = row | {"off": "naive-mae", "ratios": {"naive-mae": over, "lightly": half}}
    path.write_text(json.dumps({"environment": environment, **size, "rows": [ours, peer, old]}))
    lines = readme_table.section(path).splitlines()
    assert lines[-5] == "| step | img/s | x lightly | x mae-8 | x all off | peak GB | GFLOP/img | MFU | form |"
    assert lines[-3].endswith("| 0.50 |  | 2.00 | 3.00 | 57.8 | 70% |  |")
    assert lines[-2].endswith("|  | 2.00 |  | 3.00 | 57.8 | 70% | weights bf16, compile off |")
    assert lines[-1].endswith("| 70% | commit abcabcabcabc |")
