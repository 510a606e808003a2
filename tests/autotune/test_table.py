"""A table is found again on the machine and for the sizes that it is of, and nowhere else."""

import pytest
import torch

from ccmim_fast.autotune import table as module
from ccmim_fast.autotune.decide import Decision
from ccmim_fast.autotune.table import Table, folder, kept_tables, machine, path_of, read_table, write_table

CPU = torch.device("cpu")
DECISIONS = {
    "divide_tokens": Decision("triton", {"triton": 0.4, "reference": 1.5}, {}),
    "attention 50 x 12 x 64": Decision("sdpa", {}, {"xformers": "NotImplementedError: none"}),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def kept(**more) -> Table:
    table = Table({**machine(CPU), "images": "8", **more}, DECISIONS, 3.5)
    write_table(path_of(table.where), table)
    return table


def test_what_was_written_is_read():
    table = kept()
    assert read_table(path_of(table.where), table.where) == table
    assert table.chosen() == {"divide_tokens": "triton", "attention 50 x 12 x 64": "sdpa"}
    first, second = table.lines()
    assert first == "divide_tokens           triton  triton 0.400, reference 1.500"
    assert second == "attention 50 x 12 x 64  sdpa    xformers: NotImplementedError: none"


@pytest.mark.parametrize("key", ["images", "torch", "device", "xformers"])
def test_of_other_versions_or_sizes_it_is_ignored(key):
    table = kept()
    other = {**table.where, key: "another"}
    assert read_table(path_of(other), other) is None
    # Also where somebody renamed the file.
    assert read_table(path_of(table.where), other) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"where": {}}', '{"where": {}, "decisions": {"a": {"chosen": "b"}}, "seconds": 1}']
)
def test_a_damaged_file_is_ignored_after_one_line(text, capsys):
    table = kept()
    path = path_of(table.where)
    path.write_text(text)
    assert read_table(path, table.where) is None
    assert capsys.readouterr().err == f"{path}: damaged, ignored\n"
    assert list(kept_tables(CPU)) == []


def test_tables_of_this_machine(monkeypatch):
    ours = kept()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(module, "version_of", lambda package: "0")
        kept()
    assert list(kept_tables(CPU)) == [ours]
    assert len(list(folder().glob("*.json"))) == 2


def test_a_folder_that_cannot_be_written_is_none(tmp_path):
    (tmp_path / "ccmim_fast").write_text("a file")
    table = kept()
    assert read_table(path_of(table.where)) is None
