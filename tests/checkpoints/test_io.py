"""Checkpoints are read as they were written, pruned, and survive full disks and other writers."""

import errno
import fcntl
import hashlib
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.io import checkpoints, load, newest, save
from ccmim_fast.errors import CheckpointError


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*") if path.name != ".lock")


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def test_round_trip_of_a_training_state(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "dtypes": [torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor([2**40])],
        "plain": [1, 2.5, "ö\n", b"\0", None, True, (1, [])],
    }
    path = save(tmp_path / "made" / "here", 12, state, keep=1)
    assert path == tmp_path / "made" / "here" / "step_00000012"
    back = load(path)
    assert back["plain"] == state["plain"]
    for name in ("model", "optimizer", "dtypes"):
        torch.testing.assert_close(back[name], state[name], rtol=0, atol=0)
    restored = torch.optim.AdamW(model.parameters())
    restored.load_state_dict(back["optimizer"])


@pytest.mark.parametrize("value", [Path("x"), np.float64(1.0), np.zeros(2), {1, 2}, torch.float32, object()])
def test_what_load_would_refuse_is_refused_when_saved(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a"):
        save(tmp_path, 1, {"a": [0, value]}, keep=1)
    assert not checkpoints(tmp_path)


def test_newest_of_nothing(tmp_path):
    assert newest(tmp_path) == (None, None, [])
    assert newest(tmp_path / "missing") == (None, None, [])
    assert not (tmp_path / "missing").exists()


def test_steps_are_ordered_as_numbers(tmp_path, state_of):
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, step, state_of(step), keep=3)
    assert names(tmp_path) == ["step_00000005", "step_99999999", "step_100000000"]
    assert newest(tmp_path).path.name == "step_100000000"


def test_keep_newest(tmp_path, state_of):
    for step in range(1, 6):
        save(tmp_path, step, state_of(step), keep=2)
        assert names(tmp_path) == [f"step_{s:08d}" for s in range(max(1, step - 1), step + 1)]
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 9])
def test_keep_counts(tmp_path, keep, state_of):
    for step in range(1, 4):
        save(tmp_path, step, state_of(step), keep=9)
    save(tmp_path, 4, state_of(4), keep=keep)
    assert len(names(tmp_path)) == min(keep, 4)
    assert newest(tmp_path).path.name == "step_00000004"


def test_the_one_just_written_stays_though_it_is_not_the_newest(two, state_of):
    save(two, 1, state_of(10), keep=1)
    assert names(two) == ["step_00000001"]
    assert load(two / "step_00000001")["value"] == 10


def test_broken_checkpoints_do_not_crowd_out_whole_ones(two, state_of):
    for step in (8, 9):
        (two / f"step_{step:08d}").mkdir()
    save(two, 3, state_of(3), keep=2)
    assert names(two) == ["step_00000002", "step_00000003"]


def test_kept_for_good_besides_the_newest(tmp_path, state_of):
    for step in range(1, 7):
        save(tmp_path, step, state_of(step), keep=2, for_good=step % 2 == 0)
    assert names(tmp_path) == [f"step_{step:08d}" for step in (2, 4, 5, 6)]
    (tmp_path / "step_00000004" / io.KEPT).unlink()
    (tmp_path / "step_00000005" / io.KEPT).touch()
    save(tmp_path, 7, state_of(7), keep=1)
    assert names(tmp_path) == [f"step_{step:08d}" for step in (2, 5, 6, 7)], "the mark decides, whoever made it"
    assert [load(path)["value"] for path in checkpoints(tmp_path)] == [2, 5, 6, 7]
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("for_good", [False, True])
def test_the_manifest_is_that_of_the_first_version(tmp_path, state_of, for_good):
    """So that versions read each other's checkpoints."""
    path = save(tmp_path, 3, state_of(3), keep=1, for_good=for_good)
    content = (path / io.STATE).read_bytes()
    files = f'  "state.pt": {{\n   "size": {len(content)},\n   "sha256": "{hashlib.sha256(content).hexdigest()}"\n  }}'
    expected = f'{{\n "format": 1,\n "step": 3,\n "files": {{\n{files}\n }}\n}}'
    assert (path / io.MANIFEST).read_text() == expected


@pytest.mark.parametrize(("step", "keep"), [(-1, 1), (1, 0)])
def test_wrong_step_and_keep(tmp_path, step, keep):
    with pytest.raises(ValueError, match=f"step={step} must be >= 0 and keep={keep} >= 1"):
        save(tmp_path, step, {}, keep=keep)


def test_next_save_clears_what_a_dead_writer_left(two, state_of):
    shutil.copytree(two / "step_00000001", two / ".new_step_00000003")
    shutil.copytree(two / "step_00000001", two / ".dead_step_00000000")
    save(two, 3, state_of(3), keep=5)
    assert hidden(two) == []
    assert newest(two).state["value"] == 3


@pytest.fixture
def other_writer(two):
    (two / ".new_step_00000003").mkdir()
    with open(two / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield two


def test_a_live_writer_is_left_alone(other_writer, state_of):
    assert newest(other_writer).state["value"] == 2
    with pytest.raises(CheckpointError, match="another process is writing"):
        save(other_writer, 3, state_of(3), keep=1)
    assert hidden(other_writer) == [".new_step_00000003"]
    assert len(names(other_writer)) == 2


def test_file_system_without_locks(two, monkeypatch, state_of):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (two / ".new_step_00000009").mkdir()
    assert newest(two).state["value"] == 2
    assert hidden(two) == [".new_step_00000009"], "it may be a live writer's"
    save(two, 3, state_of(3), keep=5)
    assert newest(two).state["value"] == 3


def test_the_lock_is_free_after_a_save(two):
    with open(two / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def breaking(function, at: int, counter: list[int]):
    """`function` that fails for want of space at its `at`-th call."""

    def wrapped(*args, **kwargs):
        counter[0] += 1
        if counter[0] == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("step", [2, 3], ids=["replaces", "new step"])
@pytest.mark.parametrize(("owner", "name"), [(io.Hashed, "write"), (os, "fsync"), (os, "rename"), (os, "mkdir")])
def test_full_disk_at_every_call(two, monkeypatch, owner, name, step, state_of):
    at, messages = 0, []
    while True:
        at += 1
        counter = [0]
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, breaking(getattr(owner, name), at, counter))
            try:
                save(two, step, state_of(9), keep=5)
            except CheckpointError as error:
                messages.append(str(error))
        if counter[0] < at:
            break
        assert hidden(two) == []
        assert load(two / "step_00000001")["value"] == 1
        path, state, problems = newest(two)
        assert problems == []
        assert (path.name, state["value"]) in (("step_00000002", 2), (f"step_{step:08d}", 9))
        shutil.rmtree(two)
        for old in (1, 2):
            save(two, old, state_of(old), keep=5)
    assert len(messages) >= 1
    line = f"{two / f'step_{step:08d}'}: not saved: No space left on device; the older checkpoints are intact"
    assert set(messages) == {line}
    assert newest(two).state["value"] == 9


def test_file_size_limit_of_the_kernel(two):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match="not saved: File too large; the older checkpoints are intact"):
            save(two, 3, {"model": torch.zeros(100_000)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert hidden(two) == []
    assert names(two) == ["step_00000001", "step_00000002"]
    assert newest(two).state["value"] == 2


def test_an_interrupt_leaves_nothing(two, monkeypatch, state_of):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(two, 3, state_of(3), keep=1)
    assert hidden(two) == []


def test_an_error_of_torch_is_not_a_full_disk(two, monkeypatch, state_of):
    def fail(*_):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        save(two, 3, state_of(3), keep=1)
    assert hidden(two) == []


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="not saved: "):
        save(tmp_path / "file" / "below", 1, {}, keep=1)


def test_files_reach_the_disk_before_their_name_does(two, monkeypatch, state_of):
    order = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor):
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_rename(old, new):
        order.append(f"{Path(old).name} -> {Path(new).name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    save(two, 3, state_of(3), keep=3)
    new = ".new_step_00000003"
    assert order == [io.STATE, io.MANIFEST, new, f"{new} -> step_00000003", two.name]
