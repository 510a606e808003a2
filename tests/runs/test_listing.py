"""`ccmim runs` prints one row for each run folder, whatever state its files are in."""

import json
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from ccmim_fast.checkpoints.manifest import MANIFEST, STATE, Sum, manifest
from ccmim_fast.cli import main
from ccmim_fast.runs.listing import describe, last_line, status
from ccmim_fast.runs.state import RunState, process_start, write_state

HERE = RunState("running", os.getpid(), socket.gethostname(), process_start(os.getpid()))
CONFIG = "run:\n  log_every: 20\ntrain:\n  epochs: 800\n  batch_size: 1024\n"
LINE = {"kind": "train", "step": 40, "epoch": 1.5, "loss": 0.5, "recons": 0.25, "images_per_second": 321.4}


@pytest.fixture
def no_time_passes(monkeypatch):
    """The listing comes at the moment when the files were written."""
    now = time.time()
    monkeypatch.setattr("ccmim_fast.runs.listing.time", SimpleNamespace(time=lambda: now))


def make(folder, state=None, lines=(LINE,), config=CONFIG):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if state is not None:
        write_state(folder, state)
    return folder


def checkpoint(run, step, size=5):
    """A folder with the file `state.pt` of 5 bytes, and a manifest that says how many it should have."""
    path = run / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "state.pt").write_bytes(b"state")
    (path / MANIFEST).write_bytes(manifest(step, {STATE: Sum(size, "")}))


def test_a_row_for_each_run(tmp_path, capsys, no_time_passes):
    mine = make(tmp_path / "mine", HERE, [LINE | {"contrast": 3.0}])
    checkpoint(mine, 20)
    checkpoint(mine, 40, size=6)  # cut short
    make(tmp_path / "demo" / "[b]mae", HERE._replace(state="done"))
    make(tmp_path / "demo" / "ccmim", HERE._replace(state="failed", error="a.jpg [b] bad", exit_code=3))
    make(tmp_path / "old")
    make(tmp_path / "killed", HERE._replace(started=1), lines=[])
    (tmp_path / "mine" / "checkpoints" / "config.yaml").write_text("")
    (tmp_path / "mine" / "checkpoints" / "metrics.jsonl").write_text("")
    (tmp_path / "mine" / "loop").symlink_to(tmp_path)
    assert main(["runs", str(tmp_path)]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:7]}
    now, figures = ["0", "s"], ["1.50/800", "0.5000", "0.2500"]
    assert rows == {
        "demo/ccmim": ["failed", *figures, "321", *now],
        "demo/[b]mae": ["done", *figures, "321", *now],
        "killed": ["dead", "800", *now],
        "mine": ["running", *figures, "3.0000", "321", "20", *now],
        "old": ["unknown", *figures, "321", *now],
    }
    assert lines[7:] == ["demo/ccmim: a.jpg [b] bad"]


def test_it_fits_a_narrow_terminal(tmp_path, capsys, monkeypatch, no_time_passes):
    """A name is folded; nothing else is cut."""
    run = make(tmp_path / "a-name-of-some-length", HERE, [LINE | {"epoch": 123.45, "contrast": 3.0}])
    checkpoint(run, 123456)
    monkeypatch.setattr("ccmim_fast.commands.runs.WIDE", 80)
    assert main(["runs", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    first, *folded = [line.split() for line in printed.splitlines()[3:] if line.strip()]
    assert "".join([first[0], *(word for words in folded for word in words)]) == run.name
    assert first[1:] == ["running", "123.45/800", "0.5000", "0.2500", "3.0000", "321", "123456", "0", "s"]


def test_a_run_folder_itself(tmp_path, capsys):
    assert main(["runs", str(make(tmp_path / "run", HERE))]) == 0
    assert "running" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "age", "word"),
    [
        (HERE, 9e9, "running"),
        (HERE._replace(started=1), 0, "dead"),
        (HERE._replace(host="node7", started=1), 99, "running?"),
        (HERE._replace(host="node7"), 101, "dead?"),
        (HERE._replace(host="node7", state="stopped"), 0, "stopped"),
        (None, 0, "unknown"),
    ],
)
def test_words(state, age, word):
    assert status(state, age, 100) == word


def test_slow_steps_are_waited_for(tmp_path):
    """Twenty steps of 1024 images at 2 a second are 10,240 seconds a line."""
    cells = []
    for name, rate in (("slow", 2.0), ("fast", 2000.0)):
        run = make(tmp_path / name, HERE._replace(host="node7"), [LINE | {"images_per_second": rate}])
        for file in ("metrics.jsonl", "state.json"):
            os.utime(run / file, (time.time() - 7250,) * 2)
        cells.append(describe(run, tmp_path).cells)
    assert [(c[1], c[-1]) for c in cells] == [("running?", "2 h"), ("dead?", "2 h")]


def test_the_last_line_is_found(tmp_path):
    """Behind half a line, and before much that is of another kind."""
    path = tmp_path / "metrics.jsonl"
    other = json.dumps({"kind": "data", "step": 40, "what": "x" * 1000}) + "\n"
    path.write_text(
        json.dumps(LINE | {"step": 20}) + "\n" + json.dumps(LINE) + "\n" + '{"kind": "train", "step": 60, "ep'
    )
    assert last_line(path)["step"] == 40
    path.write_text(json.dumps(LINE) + "\n" + other * 100)
    assert last_line(path)["step"] == 40
    path.write_text(other)
    assert last_line(path) == {}


@pytest.mark.parametrize("damage", ["", "[", "\0", "- 1", "run: 1\ntrain: [1]", "train: {epochs: x, batch_size: {}}"])
def test_damage_leaves_cells_empty(tmp_path, damage):
    run = make(tmp_path / "run", config=damage, lines=[{"kind": "train", "loss": "x", "epoch": None}, [], 1])
    (run / "state.json").write_text(damage)
    checkpoint(run, 3)
    (run / "checkpoints" / "step_00000003" / "manifest.json").write_text(damage)
    assert describe(run, tmp_path).cells[:-1] == ("run", "unknown", *[""] * 6)


def test_a_name_that_is_not_text(tmp_path, capsys):
    make(tmp_path / os.fsdecode(b"r\xff"), HERE._replace(state="failed", error="\udcff"))
    assert main(["runs", str(tmp_path)]) == 0
    assert "r?: ?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["nowhere"], "'nowhere': no such folder"), (["a", "b"], "b: unexpected"), (["--all"], "--all: unknown")],
)
def test_mistakes(argv, words, capsys):
    assert main(["runs", *argv]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert words in printed[0]


def test_nothing_there(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    assert "no run below" in capsys.readouterr().out


def test_torch_is_not_imported(tmp_path):
    make(tmp_path / "run", HERE)
    code = "import sys; from ccmim_fast.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "runs", str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_a_name_commands_no_terminal(tmp_path, capsys):
    make(tmp_path / "a\x1b[31m\x9b", HERE._replace(state="failed", error="\x1b]0;title\x07", exit_code=3))
    assert main(["runs", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\x9b" not in printed
    assert r"a\x1b[31m\x9b: \x1b]0;title\x07" in printed
