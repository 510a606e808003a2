"""Checkpoints that are damaged or hostile are refused in one line before anything in them can run."""

import hashlib
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.io import checkpoints, load, newest
from ccmim_fast.errors import CheckpointError


def fails(path: Path, *words: str) -> None:
    """`load` fails with one line that names the checkpoint and holds `words`."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    for word in words:
        assert word in message


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", [io.STATE, io.MANIFEST])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99, "all but one byte"])
def test_truncated(two, name, share):
    file = two / "step_00000002" / name
    size = file.stat().st_size
    os.truncate(file, size - 1 if isinstance(share, str) else int(size * share))
    fails(file.parent, name, "damaged")
    path, state, problems = newest(two)
    assert (path.name, state["value"]) == ("step_00000001", 1)
    assert len(problems) == 1
    assert str(file.parent) in problems[0]
    assert "damaged" in problems[0]


def test_a_byte_too_many(two):
    for name in (io.STATE, io.MANIFEST):
        file = two / "step_00000002" / name
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        fails(file.parent, name, "damaged")
        file.write_bytes(content)


def test_flipped_bits_of_the_state(two):
    file = two / "step_00000002" / io.STATE
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    positions = {0, 1, len(content) - 1, *rng.integers(0, len(content), 200).tolist()}
    for position in positions:
        flip(file, position, int(rng.integers(8)))
        fails(file.parent, "state.pt is damaged: its sha256")
        file.write_bytes(content)
    assert load(file.parent)["value"] == 2


def test_every_flipped_byte_of_the_manifest(two):
    file = two / "step_00000002" / io.MANIFEST
    content = file.read_bytes()
    for position in range(len(content)):
        for bit in (0, 5, 7):
            flip(file, position, bit)
            fails(file.parent)
            file.write_bytes(content)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"[" * 60_000,
        b"\xff\xfe",
        b'{"format": 1, "step": 2, "files": {}}',
        b'{"format": 1, "step": 2, "files": {"../x": {"size": 1, "sha256": ""}}}',
        b'{"format": 1, "step": 2, "files": {"state.pt": 5}}',
        b'{"format": 1, "step": "2", "files": {"state.pt": {"size": "1", "sha256": null}}}',
        b" " * 100_000,
    ],
)
def test_malformed_manifest(two, text):
    path = two / "step_00000002"
    (path / io.MANIFEST).write_bytes(text)
    fails(path, "manifest.json is damaged")


def test_manifest_of_another_step_or_format(two):
    path = two / "step_00000002"
    manifest = path / io.MANIFEST
    content = manifest.read_bytes()
    shutil.copy(two / "step_00000001" / io.MANIFEST, manifest)
    fails(path, "manifest.json is damaged")
    manifest.write_bytes(content.replace(b'"format": 1', b'"format": 3'))
    fails(path, "format=3 must be 1 or 2")
    manifest.write_bytes(content.replace(b'"format": 1', b'"format": 2'))
    fails(path, "manifest.json is damaged")
    manifest.write_bytes(content)
    path.rename(two / "best")
    assert load(two / "best")["value"] == 2, "a renamed checkpoint is still one"


@pytest.mark.parametrize("name", [io.STATE, io.MANIFEST])
def test_missing_or_strange_file(two, name):
    file = two / "step_00000002" / name
    file.unlink()
    fails(file.parent, name, "No such file")
    assert newest(two).path.name == "step_00000001"
    file.mkdir()
    fails(file.parent, name, "not a file")
    file.rmdir()
    os.mkfifo(file)
    fails(file.parent, name, "not a file")


def test_missing_checkpoint(tmp_path):
    fails(tmp_path / "step_00000004", "no such folder")
    (tmp_path / "file").touch()
    fails(tmp_path / "file", "no such folder")


def test_all_damaged(two):
    for path in checkpoints(two):
        (path / io.STATE).write_bytes(b"")
    path, state, problems = newest(two)
    assert path is state is None
    assert [Path(problem.split(": ")[0].split()[-1]).name for problem in problems] == ["step_00000002", "step_00000001"]


class Hostile:
    """Makes a folder when unpickled."""

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def seal(path: Path) -> None:
    """Give a checkpoint a manifest that fits its state.pt."""
    content = (path / io.STATE).read_bytes()
    found = io.Sum(len(content), hashlib.sha256(content).hexdigest())
    (path / io.MANIFEST).write_bytes(io.manifest(int(path.name[5:]), {io.STATE: found}))


@pytest.mark.parametrize("kind", ["torch", "torch legacy", "pickle"])
def test_hostile_pickle_runs_no_code(two, tmp_path_factory, kind):
    mark = tmp_path_factory.mktemp("hostile") / "ran"
    hostile = {"model": Hostile(mark), "step": 1}
    path = two / "step_00000002"
    if kind == "pickle":
        (path / io.STATE).write_bytes(pickle.dumps(hostile))
    else:
        torch.save(hostile, path / io.STATE, _use_new_zipfile_serialization=kind == "torch")
    seal(path)
    fails(path, "state.pt refused")
    assert newest(two).path.name == "step_00000001"
    assert not mark.exists()
    torch.load(path / io.STATE, weights_only=False) if kind != "pickle" else pickle.loads(pickle.dumps(hostile))
    assert mark.exists(), "the hostile file is harmless: the test tests nothing"


def test_hostile_manifest(two, tmp_path_factory):
    mark = tmp_path_factory.mktemp("hostile") / "ran"
    (two / "step_00000002" / io.MANIFEST).write_bytes(pickle.dumps(Hostile(mark)))
    fails(two / "step_00000002", "manifest.json is damaged")
    assert not mark.exists()


def test_nothing_is_unpickled_before_the_checksum(two, monkeypatch):
    flip(two / "step_00000002" / io.STATE, 100, 0)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read before it was checked"))
    fails(two / "step_00000002", "sha256")


@pytest.mark.parametrize("content", [[1, 2], 5, torch.zeros(2)])
def test_a_state_is_a_dict(two, content):
    path = two / "step_00000002"
    torch.save(content, path / io.STATE)
    seal(path)
    fails(path, "expected a dict")


def test_bytes_that_are_no_state(two):
    path = two / "step_00000002"
    for content in (b"", b"hello", b"PK\x03\x04" + bytes(100), bytes(1000)):
        (path / io.STATE).write_bytes(content)
        seal(path)
        fails(path, "state.pt refused")
