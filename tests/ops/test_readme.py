"""The example in kernels/README.md runs as it stands, and docs/kernels.md has the floors of every op."""

import importlib
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks" / "ops"))
registry = importlib.import_module("registry")


def test_the_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "kernels" / "README.md").read_text(), re.DOTALL)
    names = {}
    try:
        exec(code, names)
    finally:
        torch.set_default_device(None)
    assert names["loss"].isfinite()
    assert names["pred"].grad.abs().sum() > 0
    assert len(code.strip().splitlines()) < 16


def test_every_op_has_its_row():
    """The figures of each row are the floors of the op; a row that is missing is told by this test."""
    page = (ROOT / "docs" / "kernels.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (.+) \|$", page, re.M)
    assert dict(rows) == {op: figures_of(op) for op in registry.NAMES}
    assert [op for op, _ in rows] == registry.NAMES, "the rows are not in alphabetical order"


def test_every_page_that_counts_the_ops_counts_all():
    words = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    for page in ("README.md", "CHANGELOG.md", "kernels/README.md", "docs/kernels.md"):
        found = re.findall(r"(\w+) ops\b", (ROOT / page).read_text().lower())
        assert {count for count in found if count in words} == {words[len(registry.NAMES) - 1]}, page


def figures_of(op: str) -> str:
    """Return MB, and microseconds of each pass at the rates that the page names."""
    passes = registry.benchmark(op).floor(registry.Size(1024))
    times = [f"{passes[p].seconds(3.0e12, 8e14) * 1e6:.0f}" if p in passes else "-" for p in registry.PASSES]
    return " | ".join([f"{passes['forward'].bytes / 1e6:.0f}", *times])
