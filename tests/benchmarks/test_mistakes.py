"""A mistake in the options of any benchmark is one line and exit code 2, as everywhere in `ccmim`."""

import importlib
from pathlib import Path

import pytest

from ccmim_fast.errors import ConfigError


@pytest.mark.parametrize("name", ["data", "attention", "bench"])
def test_one_line(name, monkeypatch, capsys):
    if name == "bench":
        monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "ops")
    parse = importlib.import_module(name).parse
    with pytest.raises(SystemExit) as left:
        parse(["--nonsense=1"])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    prog = "ccmim bench ops" if name == "bench" else f"ccmim bench {name}"
    assert line == f"ccmim: {prog}: unrecognized arguments: --nonsense=1"


@pytest.mark.parametrize("name", ["throughput", "ladder", "bank"])
def test_one_line_of_those_that_share_options(name):
    with pytest.raises(ConfigError, match=f"^ccmim bench {name}: "):
        importlib.import_module(name).main(["--rounds=x"])
