import json

import pytest

from ccmim_fast.errors import DataError
from ccmim_fast.report.runs import Comparison, RunView, compare, differences, flatten, merge_equal


def test_flatten():
    nested = {"a": {"b": [1, 2], "c": {"d": None}}, "e": "λ", 3: True, "f": {}}
    assert flatten(nested) == {"a.b": "[1, 2]", "a.c.d": "null", "e": "λ", "3": "true"}


def test_compare_keeps_the_order_and_leaves_out_the_empty():
    comparison = compare(["x", "none", "y"], [{"a": "1", "b": "2"}, {}, {"c": "4", "b": "2"}])
    assert comparison == Comparison(["x", "y"], [("a", ["1", ""]), ("b", ["2", "2"]), ("c", ["", "4"])])
    assert differences(comparison).rows == [("a", ["1", ""]), ("c", ["", "4"])]
    assert merge_equal(comparison) == comparison


def test_merge_equal():
    equal = compare(["x", "y"], [{"a": "1"}, {"a": "1"}])
    assert merge_equal(equal) == Comparison(["every run"], [("a", ["1"])])
    single = compare(["x"], [{"a": "1"}])
    assert merge_equal(single) == single


def test_an_empty_folder_is_an_empty_run(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        run = RunView("x", folder)
        assert (run.config(), run.environment(), run.metrics(), run.snapshots()) == ({}, {}, [], [])


def test_reads_what_is_there(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\nmask: {ratio: 0.75}\n")
    (tmp_path / "environment.json").write_text(json.dumps({"versions": {"torch": "2.15"}}))
    run = RunView("x", tmp_path)
    assert run.config() == {"seed": "0", "mask.ratio": "0.75"}
    assert run.environment() == {"versions.torch": "2.15"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "a: [1"),
        ("config.yaml", "- 1"),
        ("config.yaml", "!!python/object/apply:dict [{a: 1}]"),
        ("environment.json", '{"a":'),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    run = RunView("x", tmp_path)
    with pytest.raises(DataError, match=name):
        run.config(), run.environment()
