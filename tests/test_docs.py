"""docs/: the pages build strictly, and what they name of the code is there."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.keys import sections, settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
METHOD = (ROOT / "docs" / "method.md").read_text()
PARITY = (ROOT / "docs" / "parity.md").read_text()
FUNCTIONS = sorted({named for page in PAGES for named in re.findall(r"`([\w/]+\.py::\w+)`", page.read_text())})


# The tests that docs/faults.md names are looked for by its own test.
@pytest.mark.parametrize("named", [named for named in FUNCTIONS if "tests/" not in named or named in PARITY])
def test_functions_that_are_named_exist(named):
    path, _, name = named.partition("::")
    defined = ast.parse((ROOT / path).read_text()).body
    assert name in {node.name for node in defined if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("number", [4, 7, 8, 9, 10])
def test_every_equation_has_its_function(number):
    """And the function's own file says which equation it is."""
    part = re.search(rf"^## .*Eq\. {number}$(.*?)(?=^## |\Z)", METHOD, re.M | re.S)[1]
    paths = re.findall(r"`([\w/]+\.py)::\w+`", part)
    assert any(f"Eq. {number}" in (ROOT / path).read_text() for path in paths)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_named_exist(page):
    """Every `section.key`, in words and in commands, but for files such as `data.md`; two pages have evaluations'."""
    pages = {"evaluation.md": settings(EvalConfig), "export.md": {*settings(), *settings(EvalConfig)}}
    known = pages.get(page.name, settings())
    code = re.findall(r"`+[^`]+`+", re.sub(r"^```python\n.*?^```", "", page.read_text(), flags=re.M | re.S))
    named = re.findall(rf"(?<![\w./])(?:{'|'.join(sections())})\.\w+(?![\w(])", " ".join(code))
    unknown = {
        name for name in named if name not in known and name.rpartition(".")[2] not in ("md", "py", "json", "onnx")
    }
    assert not unknown


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """Strictly: a link to a page, a heading or a file that is not there fails. No page loads from another host."""
    out = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr[-2000:]
    made = {path.relative_to(out).as_posix() for path in out.rglob("*.html")}
    assert {page.with_suffix(".html").name for page in PAGES[1:]} <= made
    assert any(path.startswith("benchmarks/results/") for path in made)
    for path in made:
        html = (out / path).read_text()
        assert not re.findall(r'\ssrc="(?:https?:)?//[^"]*"|<link[^>]*rel="stylesheet"[^>]*href="(?:https?:)?//', html)
