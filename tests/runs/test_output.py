"""What a command makes is seen when it is whole: a new folder, a new file."""

import subprocess
import sys

import pytest

from ccmim_fast.errors import ConfigError
from ccmim_fast.runs.output import new_file, new_folder


def make(folder, error=None):
    with new_folder(folder, "x") as made:
        (made / "sub").mkdir()
        (made / "sub" / "file").write_text("whole")
        assert not folder.is_dir() or not [*folder.iterdir()], "nothing is seen before the end"
        if error is not None:
            raise error


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_appears_whole_or_not_at_all(tmp_path, there):
    out = tmp_path / "above" / "out"
    if there:
        out.mkdir(parents=True)
    with pytest.raises(ZeroDivisionError):
        make(out, ZeroDivisionError())
    assert [*tmp_path.rglob("*")] == ([out.parent, out] if there else [])
    make(out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["above", "file", "out", "sub"]
    with pytest.raises(ConfigError, match=r"x: '.*out' is not empty; name a new folder"):
        make(out)
    assert (out / "sub" / "file").read_text() == "whole"


def test_an_empty_folder_that_cannot_be_replaced_is_filled(tmp_path, monkeypatch):
    """Such as the place where a disk is mounted."""

    def busy(self, target):
        raise OSError(16, "Device or resource busy")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr("pathlib.Path.rename", busy)
    make(tmp_path / "out")
    assert (tmp_path / "out" / "sub" / "file").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_links_and_dots_name_the_same_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    make(tmp_path / "real" / ".." / "link")
    assert (tmp_path / "real" / "sub" / "file").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_what_is_in_the_way_is_refused_and_stays(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "photo.jpg").write_text("mine")
    with pytest.raises(ConfigError, match=rf"{name}' is not empty; name a new folder"):
        make(tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file' is not empty"):
        make(tmp_path / "file")
    assert (tmp_path / name / "photo.jpg").read_text() == "mine"


def test_a_killed_one_is_begun_anew_and_a_living_one_is_told(tmp_path):
    code = """
import pathlib, sys, time
from ccmim_fast.runs.output import new_folder
with new_folder(pathlib.Path(sys.argv[1]), "x") as made:
    (made / "half").touch()
    print("made", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "made\n"
    with pytest.raises(ConfigError, match=f"x: '.*out': process {process.pid} on .* is at work"):
        make(tmp_path / "out")
    assert (tmp_path / "out.partial" / "out" / "half").exists()
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    make(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "out", "sub"]


def test_a_file_appears_whole_and_takes_no_other_s_place(tmp_path):
    out = tmp_path / "above" / "x.safetensors"

    def write(error=None):
        with new_file(out, "x") as made:
            made.write_text("whole")
            assert not out.exists()
            if error is not None:
                raise error

    with pytest.raises(ZeroDivisionError):
        write(ZeroDivisionError())
    assert not [*tmp_path.iterdir()]
    write()
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    with pytest.raises(ConfigError, match=r"x: '.*safetensors' exists; remove it, or name another file"):
        write()
    out.unlink()
    out.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="exists"):
        write()
