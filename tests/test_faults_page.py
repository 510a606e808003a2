"""docs/faults.md: each fault is told once, and the tests that hold it are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLES, HELD = (ROOT / "docs" / "faults.md").read_text().split("## Which test holds it")
FAULTS = [*range(1, 46)]
ENTRIES = {int(number): text for number, text in re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |\Z)", HELD, re.M | re.S)}


def test_every_fault_is_told_once_and_held():
    numbers = re.findall(r"^\| (\d+) \| [^|\n]+ \| [^|\n]+ \|", TABLES, re.M)
    assert sorted(map(int, numbers)) == [*FAULTS]
    assert {number for number, text in ENTRIES.items() if "::test_" in text} == {*FAULTS}


@pytest.mark.parametrize("number", ENTRIES)
def test_the_tests_that_are_named_exist(number):
    named = re.findall(r"`([^`]+)`", ENTRIES[number])
    for path, _, name in (test.partition("::") for test in named):
        tree = ast.parse((ROOT / path).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"
        assert name.startswith("test_")
