"""What a command may do to a folder: nothing to what no run wrote, before all is checked, or beside another process."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ccmim_fast.config.schema import Config, DataConfig, RunConfig
from ccmim_fast.errors import ConfigError, DataError, MachineError
from ccmim_fast.runs import claim
from ccmim_fast.runs.claim import LOCK, claimed
from ccmim_fast.runs.folder import check_apart, evaluation_folder, run_folder
from ccmim_fast.runs.state import FILE, RunState, process_start, read_state, write_state

CPU = torch.device("cpu")


def opened(folder, begin=None, error=None, files=(), reads=None, resumable=True, **options):
    """Open the folder as a command does, which then writes files and fails if there is an `error`."""
    with run_folder(RunConfig(dir=str(folder), **options), reads or {}, resumable=resumable) as there:
        if begin is not None:
            there.begin(begin, CPU)
        for name in files:
            (there.path / name).parent.mkdir(exist_ok=True)
            (there.path / name).touch()
        if error is not None:
            raise error


def refused(folder, words, **options):
    with pytest.raises(ConfigError, match=words):
        opened(folder, **options)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "mine"
    (folder / "checkpoints" / "step_00000008").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000008" / "manifest.json").touch()
    return folder


@pytest.mark.parametrize("place", [".", "..", "../..", "checkpoints", "checkpoints/step_00000008"])
@pytest.mark.parametrize("checkpoint", [".", "checkpoints/step_00000008"])
def test_no_evaluation_is_written_over_what_it_evaluates(run, place, checkpoint):
    words = r"^run\.dir=.*: (holds checkpoint=.*, which is read|lies among the .*); choose another folder$"
    with pytest.raises(ConfigError, match=words):
        check_apart(str(run / place), {"checkpoint": str(run / checkpoint)})


def test_its_own_folder_and_others_are_free(run, tmp_path):
    for folder in (
        evaluation_folder(str(run), "knn"),
        run / "eval",
        tmp_path / "runs" / "other",
        tmp_path / "elsewhere",
    ):
        check_apart(str(folder), {"checkpoint": str(run)})
    file = tmp_path / "weights" / "mae.pth"
    file.parent.mkdir()
    file.touch()
    check_apart(str(tmp_path / "runs"), {"checkpoint": str(file)})
    check_apart("runs/eval/knn", {"checkpoint": "timm:vit_base_patch16_224"})
    with pytest.raises(ConfigError):
        check_apart(str(tmp_path / "weights"), {"checkpoint": str(file)})


@pytest.mark.parametrize("root", ["set", "set/train", "link", "set/*.tar", "set/{a,b}.tar"])
@pytest.mark.parametrize("folder", ["set", "set/../set", "also"])
def test_images_in_the_run_s_folder_are_refused_by_name(tmp_path, monkeypatch, root, folder):
    monkeypatch.chdir(tmp_path)
    Path("set/train").mkdir(parents=True)
    Path("link").symlink_to("set/train")
    Path("also").symlink_to("set")
    with pytest.raises(ConfigError, match=rf"run\.dir={folder}: holds data\.root="):
        check_apart(folder, {"data.root": root})
    for apart in ("set/train/runs/a", "sets", "setting/a"):
        check_apart(apart, {"data.root": root, "data.test": "", "other": "https://host/set"})


def make_run(folder, **files):
    """A run as one leaves it, with further files."""
    opened(folder, begin=Config())
    for name in ("metrics.jsonl", "checkpoints/step_00000001/state.pt", "tensorboard/events.out.tfevents.1"):
        files.setdefault(name, "run")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHERS = ("notes.txt", "checkpoints/mine.txt", "checkpoints/step_00000001/notes.txt", "eval/knn/result.json")
OTHERS += ("other/metrics.jsonl", "other/checkpoints/step_00000001/state.pt", "a.png", "step_00000001/state.pt")


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(tmp_path, capsys):
    make_run(tmp_path / "run", **dict.fromkeys(OTHERS, "mine"))
    with run_folder(RunConfig(dir=str(tmp_path / "run"), overwrite=True), {}) as there:
        assert "metrics.jsonl" in contents(tmp_path / "run"), "nothing goes before all is checked"
        there.begin(Config(), CPU)
    assert {*contents(tmp_path / "run")} == {"config.yaml", "environment.json", FILE, *OTHERS}
    assert not (tmp_path / "run" / "tensorboard").exists()
    names = "'a.png', 'checkpoints', 'eval', 'notes.txt', 'other', 'step_00000001'"
    assert f"run.dir={tmp_path / 'run'}: stays, as no run wrote it: {names}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.jpg": ""}, "no run of ccmim: it holds 'a.jpg'"),
        (
            {"config.yaml": "a: 1", "metrics.jsonl": "{}", "checkpoints/last.pt": ""},
            "no run of ccmim: it holds .* 2 more",
        ),
        ({"environment.json": '{"torch": "2"}', "state.json": '{"state": "on"}'}, "no run of ccmim"),
        ({"runs/a/state.json": "{}"}, "no run of ccmim: it holds 'runs'"),
        ({".hidden": ""}, "no run of ccmim: it holds '.hidden'"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path, files, words, overwrite):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    refused(tmp_path, rf"not empty, and {words}.*; choose another folder", overwrite=overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": "auto"}])
def test_a_command_that_fails_leaves_all_as_it_was(tmp_path, options):
    if options:
        make_run(tmp_path / "above" / "run", **{"notes.txt": "mine"})
    before = contents(tmp_path)
    files = ("autotune.json", "scores_0.bin")
    with pytest.raises(ZeroDivisionError):
        opened(tmp_path / "above" / "run", files=files, error=ZeroDivisionError(), **options)
    assert contents(tmp_path) == before
    assert options or not [*tmp_path.iterdir()], "folders that were made for it are gone, too"


def test_a_run_that_made_nothing_blocks_no_other(tmp_path):
    """Killed while it was built, or failed in its first step."""
    with pytest.raises(ZeroDivisionError):
        opened(tmp_path, begin=Config(), files=("metrics.jsonl", "log.txt"), error=ZeroDivisionError())
    assert read_state(tmp_path).state == "failed"
    opened(tmp_path, begin=Config())
    assert {*contents(tmp_path)} == {"config.yaml", "environment.json", FILE}
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}')
    refused(tmp_path, "not empty; use --overwrite", resumable=False)


def test_another_run_s_checkpoint_does_not_open_this_run_s_folder(tmp_path):
    """Its records would be cut."""
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    own, other = (str(tmp_path / name / "checkpoints" / "step_00000001") for name in "ab")
    opened(tmp_path / "a", resume=own)
    refused(tmp_path / "a", "not empty", resume=other)
    words = r"would remove run\.resume=.*step_00000001; leave one of them out"
    refused(tmp_path / "a", words, resume=own, overwrite=True)
    opened(tmp_path / "a", resume=other, overwrite=True)


HOLD = """
import pathlib, sys, time
from ccmim_fast.runs.claim import claimed
with claimed(pathlib.Path(sys.argv[1]), "x"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": "auto"}])
def test_the_second_process_is_told_and_a_killed_one_is_not_waited_for(tmp_path, options):
    make_run(tmp_path)
    before = contents(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    refused(tmp_path, rf"process {process.pid} on {socket.gethostname()} is at work in it; wait", **options)
    with pytest.raises(ConfigError, match="is at work"), claimed(tmp_path, "x"):  # by the lock, whatever files say
        pass
    process.kill()
    process.wait()
    assert contents(tmp_path) == {LOCK: (tmp_path / LOCK).read_bytes(), **before}
    opened(tmp_path, **options or {"overwrite": True})
    assert contents(tmp_path) == before


def test_the_lock_is_gone_with_its_process_and_a_removed_one_counts_for_nothing(tmp_path):
    with claimed(tmp_path, "x"):
        (tmp_path / LOCK).unlink()  # as the holder does at its end; another may have opened it before
        with claimed(tmp_path, "y"), pytest.raises(ConfigError, match="z: process"), claimed(tmp_path, "z"):
            pass
    assert not [*tmp_path.iterdir()]


def test_a_run_of_an_older_version_that_runs_is_told_by_its_state(tmp_path):
    make_run(tmp_path)
    write_state(tmp_path, RunState("running", os.getppid(), socket.gethostname(), process_start(os.getppid())))
    refused(tmp_path, f"process {os.getppid()} on .* is at work", resume="auto")
    write_state(tmp_path, RunState("running", os.getppid(), socket.gethostname(), 1))  # the pid is another's now
    opened(tmp_path, resume="auto")


@pytest.mark.parametrize("lives", [False, True])
def test_a_run_of_another_machine_is_waited_for_or_named_with_a_way_out(tmp_path, monkeypatch, capsys, lives):
    make_run(tmp_path)
    write_state(tmp_path, RunState("running", 7, "node7", 1))
    words = r"process 7 on node7 may be at work in it; if it has ended, remove state\.json there, or wait"
    refused(tmp_path, words, overwrite=True)
    times = iter([1, 1, 1, 1, *([2] * 100 if lives else [1] * 100)])
    monkeypatch.setattr(claim, "_time_of", lambda path: next(times))
    monkeypatch.setattr(claim, "_WATCHED", 0.05)
    if lives:
        refused(tmp_path, "process 7 on node7 is at work", resume="auto")
    else:
        opened(tmp_path, resume="auto")
    assert "process 7 on node7 may be at work in it: waiting for a sign of life" in capsys.readouterr().out
    for path in tmp_path.rglob("*"):  # a quarter of an hour later nobody waits
        os.utime(path, (path.stat().st_mtime - 900,) * 2)
    opened(tmp_path, overwrite=True)
    assert not capsys.readouterr().out


def test_the_lock_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "_BEAT", 0.01)
    with claimed(tmp_path, "x"):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        os.utime(tmp_path / LOCK, (1, 1))
        assert claim.is_watched_alive([tmp_path / LOCK])


def test_other_ranks_hold_and_change_nothing(tmp_path):
    with run_folder(RunConfig(dir=str(tmp_path / "run")), {}) as first:
        with run_folder(RunConfig(dir=str(tmp_path / "run")), {}, is_main=False) as other:
            other.begin(Config(), CPU)
        assert [path.name for path in first.path.iterdir()] == [LOCK]


def test_no_file_of_a_run_holds_a_password(tmp_path, monkeypatch):
    root = "https://me:secret@host/x.tar?sig=secret"
    monkeypatch.setattr(sys, "argv", ["ccmim", "pretrain", f"--data.root={root}"])
    error, config = DataError(f"{root}: no such file"), Config(data=DataConfig(root=root))
    with pytest.raises(DataError):
        opened(tmp_path, begin=config, error=error, reads={"data.root": root})
    assert "host/x.tar" in (tmp_path / FILE).read_text()
    assert not [name for name, content in contents(tmp_path).items() if b"secret" in content]


def test_a_full_disk_when_a_run_begins_is_one_line(tmp_path, monkeypatch):
    make_run(tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()

    def full(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MachineError, match=r"config\.yaml.*: not written: No space left on device"):
        opened(tmp_path, begin=Config(), resume="auto")
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_what_ranks_reported_stays_and_blocks_nothing(tmp_path):
    """A rank that ends later than the first reads there why."""
    with pytest.raises(ZeroDivisionError):
        opened(tmp_path, files=("ranks/stopped_0.txt", "scores_1.bin"), error=ZeroDivisionError())
    assert [*contents(tmp_path)] == ["ranks/stopped_0.txt"]
    opened(tmp_path, begin=Config())
    assert {*contents(tmp_path)} == {"config.yaml", "environment.json", FILE}
