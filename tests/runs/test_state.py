"""What a run says of itself: how it ended, whether its process is there, and the lines that it printed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_config

from ccmim_fast.engine.pretraining import fit
from ccmim_fast.errors import DataError
from ccmim_fast.runs.metrics import ProgressLine
from ccmim_fast.runs.state import FILE, RunState, is_alive, process_start, read_state, recorded, write_state


class SignalError(DataError):
    """As an error with a signal's exit code."""

    exit_code = 143


@pytest.mark.parametrize(
    ("error", "finished", "state", "code", "line"),
    [
        (None, True, "done", 0, ""),
        (None, False, "stopped", None, ""),
        (KeyboardInterrupt(), True, "stopped", 130, ""),
        (SystemExit(143), False, "stopped", 143, ""),
        (SystemExit(0), False, "stopped", 0, ""),
        (SystemExit(), False, "stopped", 0, ""),
        (SignalError("SIGTERM"), False, "stopped", 143, ""),
        (SystemExit(9), False, "failed", 9, "SystemExit: 9"),
        (SystemExit("no room"), False, "failed", 1, "SystemExit: no room"),
        (DataError("two\n lines"), False, "failed", 3, "two lines"),
        (ValueError("x" * 999), False, "failed", 1, "ValueError: " + "x" * 288),
    ],
)
def test_how_it_ended(tmp_path, error, finished, state, code, line):
    def run():
        with recorded(tmp_path, True, lambda: finished):
            now = read_state(tmp_path)
            assert (now.state, now.pid, now.exit_code) == ("running", os.getpid(), None)
            assert is_alive(now)
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    said = read_state(tmp_path)
    assert (said.state, said.exit_code, said.error) == (state, code, line)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_other_ranks_say_nothing(tmp_path):
    with recorded(tmp_path, False, lambda: True):
        pass
    assert not list(tmp_path.iterdir())


def test_a_killed_process_is_not_alive(tmp_path):
    """Asked while it is a zombie, then when it is gone."""
    code = (
        "import pathlib, sys, time; from ccmim_fast.runs.state import recorded\n"
        "with recorded(pathlib.Path(sys.argv[1]), True, bool): time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    deadline = time.monotonic() + 60
    while read_state(tmp_path) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    state = read_state(tmp_path)
    assert state.pid == process.pid
    assert is_alive(state)
    process.kill()
    while is_alive(state) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(state)
    process.wait()
    assert not is_alive(state)
    assert read_state(tmp_path).state == "running"


def test_a_pid_that_is_used_again_is_told(tmp_path):
    with recorded(tmp_path, True, lambda: True):
        state = read_state(tmp_path)
    assert not is_alive(state._replace(started=state.started - 1))
    assert not is_alive(state._replace(started=None))
    assert is_alive(state._replace(host="another")) is None
    # Process 1 was there before this one, whatever its name.
    assert process_start(1) < state.started


UNKNOWN = '{"state": "lost", "pid": 1, "host": "here", "started": 2}'


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": "running"}', UNKNOWN, "[" * 99999])
def test_damage_is_silence(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    assert read_state(tmp_path) is None


def test_a_write_that_fails_leaves_the_older_state(tmp_path, monkeypatch):
    old = RunState("running", 1, "here", 2)
    write_state(tmp_path, old)

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:5])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    write_state(tmp_path, old._replace(state="done"))
    assert read_state(tmp_path) == old


def config_for(folder, **fields):
    return tiny_config(
        run={"dir": str(folder / "run"), "log_every": 1, "save_every": 1, "tensorboard": False, **fields},
        data={"source": "shapes", "root": str(folder / "cache"), "samples": 8, "loader": "torch"},
        train={"epochs": 2, "batch_size": 4, "device": "cpu", "precision": "fp32"},
    )


def test_a_run_says_how_it_ends_and_keeps_its_lines(tmp_path, capsys):
    def stop(epoch, run):
        if epoch == 1:
            raise KeyboardInterrupt

    def fail(epoch, run):
        assert read_state(tmp_path / "run").state == "running"
        raise DataError("a.jpg cannot be read")

    with pytest.raises(KeyboardInterrupt):
        fit(config_for(tmp_path), after_epoch=stop)
    assert read_state(tmp_path / "run").state == "stopped"
    with pytest.raises(DataError):
        fit(config_for(tmp_path, resume="auto"), after_epoch=fail)
    assert read_state(tmp_path / "run")[4:] == ("a.jpg cannot be read", 3)
    fit(config_for(tmp_path, resume="auto"))
    assert read_state(tmp_path / "run").state == "done"
    # The two runs that went on: the second from the last step, where nothing was left to do.
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    # A first step may note, besides, that it waited for images.
    assert [line.split(" · ")[0] for line in lines if not line.startswith("step ")] == [
        *("8 images", "epoch 0.50", "epoch 1.00"),
        *("8 images", "epoch 1.50", "epoch 2.00"),
        "8 images",
    ]
    assert lines == capsys.readouterr().out.splitlines()


def test_the_log_has_headline_and_notes_of_the_first_rank(tmp_path):
    for shown in (True, False):
        line = ProgressLine("8 images", 4, 0, shown, tmp_path / "log.txt")
        line.note("a note on \udcff")
        line.close()
    assert (tmp_path / "log.txt").read_text() == "8 images\na note on ?\n"


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    ProgressLine("8 images", 4, 0, True, tmp_path / "nowhere" / "log.txt").close()
    assert capsys.readouterr().out == "8 images\n"
