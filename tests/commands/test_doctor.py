"""`ccmim doctor`: what is there, missing, broken, crashing or hanging, and what it says of each (fault 21)."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ccmim_fast.autotune.decide import Decision
from ccmim_fast.autotune.table import Table, machine, path_of, write_table
from ccmim_fast.cli import main
from ccmim_fast.config.keys import settings
from ccmim_fast.doctor import parts as module
from ccmim_fast.doctor import trials
from ccmim_fast.doctor.parts import Part, Row, examine, gpus, parts

MODULES = {
    "sound_library": "",
    # As torch.compile tells an error of another process: the cause, within a message, before advice.
    "uncompiled_library": """
class InductorError(Exception): pass
cause = "Traceback (most recent call last):\\n  File x\\nRuntimeError: Failed to find C compiler"
raise InductorError(f"An error in a subprocess:\\n\\n{cause}\\n\\nSet TORCHDYNAMO_VERBOSE=1 for the full stack\\n")""",
    "broken_library": "raise ImportError('libfoo.so.7: cannot open\\nshared object file')",
    "crashing_library": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "exiting_library": "import os; os._exit(3)",
    "hanging_library": "import time; time.sleep(600)",
}


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    # The package index's web toolkit, which is not NVIDIA's apex.
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(filter(None, sys.path))}")
    monkeypatch.syspath_prepend(tmp_path)


def part(module, trial=None):
    trial = trial or ("imported", module)
    return Part(module, trial, "another", "pip install it", packages=("no-such-package", "pytest"))


def test_present_missing_and_broken(libraries):
    asked = [part(name) for name in ("sound_library", "no_such_library", *list(MODULES)[2:5])]
    sound, missing, broken, crashing, exiting = examine(asked)
    assert sound == Row("sound_library", pytest.__version__, "loads", "another", "")
    assert missing == Row("no_such_library", "", "not installed", "another", "pip install it")
    cause = "no: ImportError: libfoo.so.7: cannot open shared object file"
    again = "python -m ccmim_fast.doctor.trials imported broken_library"
    assert broken[2:] == (cause, "another", "pip install it", again)
    assert crashing.works == "no: ended by SIGSEGV"
    assert exiting.works == "no: exit code 3"


def test_the_cause_of_a_failed_compilation(libraries):
    (row,) = examine([part("uncompiled_library")])
    assert row.works == "no: RuntimeError: Failed to find C compiler"


def test_what_works_needs_nothing_else():
    (row,) = examine([part("submitit", trial=("submitit",))])
    assert row == Row("submitit", pytest.__version__, "yes", "", "")


def test_what_hangs_is_killed_with_what_it_started(libraries, monkeypatch):
    monkeypatch.setattr("ccmim_fast.doctor.trials.PATIENCE", 2.0)
    (row,) = examine([part("hanging_library")])
    assert row.works == "no: no answer in 2 seconds"
    assert subprocess.run(["pgrep", "-f", "imported hanging_library"], capture_output=True).stdout == b""


def test_the_web_toolkit_is_no_apex(libraries):
    (asked,) = (one for one in parts(on_cuda=False) if one.name == "apex")
    (row,) = examine([asked])
    assert row.works == "no: ModuleNotFoundError: No module named 'apex.optimizers'"
    assert "git clone https://github.com/NVIDIA/apex" in row.install
    assert "never `pip install apex`" in row.install


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize(("cuda", "dali"), [("13.2", "130"), ("12.6", "120"), (None, "130")])
def test_the_lines_that_install(on_cuda, cuda, dali, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = {one.name: one for one in parts(on_cuda)}
    assert found.keys() >= {"triton", "xformers", "apex", "DALI", "TensorBoard", "submitit"}
    assert ("torch.compile" in found) == on_cuda
    assert found["DALI"].install == f"pip install nvidia-dali-cuda{dali}"
    assert found["DALI"].trial == ("dali", "cuda" if on_cuda else "cpu")
    # What is named instead is a setting.
    keys = [one.instead.partition("=")[0] for one in found.values() if "=" in one.instead]
    assert len(keys) == 4 + on_cuda
    assert all(key in settings() for key in keys)


def test_xformers_for_each_cuda(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.15.0+cu132")
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    (line,) = (one.install for one in parts(True) if one.name == "xformers")
    assert line == "pip install xformers nvidia-cuda-runtime-cu12"
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    (line,) = (one.install for one in parts(True) if one.name == "xformers")
    assert line == "pip install xformers"
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    (line,) = (one.install for one in parts(True) if one.name == "xformers")
    assert line == "pip install xformers==0.0.31.post1"


def fake_driver(folder, monkeypatch, text):
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{text}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_gpu_that_torch_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    fake_driver(tmp_path, monkeypatch, "echo 'NVIDIA GeForce GTX 1080 Ti, 470.82.01'")
    row = gpus()[1]
    assert row.found == "NVIDIA GeForce GTX 1080 Ti, driver 470.82.01"
    assert row.works.startswith(f"no: torch {torch.__version__} does not see it; its driver is too old")
    assert row.instead == "the CPU"
    assert "https://pytorch.org" in row.install


@pytest.mark.parametrize("text", ["exit 9", "echo; exit 0"])
def test_no_gpu_at_all(tmp_path, monkeypatch, text):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    fake_driver(tmp_path, monkeypatch, text)
    assert gpus()[1][:3] == ("GPU", "none", "not installed")


@pytest.mark.parametrize(
    ("capability", "works", "install"), [((6, 1), "no: no kernel image", True), ((9, 0), "yes", False)]
)
def test_a_gpu_is_tried(tmp_path, monkeypatch, capability, works, install):
    """The newest torch has no code for a GTX 1080 Ti."""
    fake_driver(tmp_path, monkeypatch, "echo 'a, 595.1'; echo 'b, 595.1'")
    tried = []
    properties = SimpleNamespace(name="NVIDIA Something", total_memory=11 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(module, "try_all", lambda trials: tried.extend(trials) or [works])
    _, first, second = gpus()
    assert tried == [("cuda", "0"), ("cuda", "1")]
    major, minor = capability
    assert first.found == f"NVIDIA Something, 11 GiB, compute capability {major}.{minor}, driver 595.1"
    assert (first.name, second.name) == ("cuda:0", "cuda:1")
    assert first.works == works
    assert ("torch==2.7.1" in first.install) == install


def test_the_table(monkeypatch, capsys):
    rows = [
        Row("one", "1.0", "yes"),
        Row("four", "", "no: 4", again="python -m four"),
        Row("two", "", "not installed", "three [x]", "pip install 'two[cuda13]'"),
    ]
    monkeypatch.setattr(module, "examine", lambda asked: rows)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "precision=auto" in out
    # Brackets are text, not markup, and the line to copy is not broken.
    assert "three [x]" in out
    assert "\nfor two: pip install 'two[cuda13]'\n" in out
    assert "for one" not in out
    assert "\nall that four says: python -m four\n" in out
    assert "says" not in out.replace("all that four says", "")


def test_the_newest_table_of_choices(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "examine", lambda asked: [])
    assert main(["doctor"]) == 0
    assert "no run has measured this machine yet" in capsys.readouterr().out
    where = machine(torch.device("cpu")) | {"model.arch": "vit_x", "images": "8", "precision": "bf16"}
    write_table(path_of(where), Table(where, {"cls_row": Decision("triton", {"triton": 1, "reference": 2}, {})}, 3.0))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "newest of 1 tables" in out
    assert "  cls_row  triton  triton 1.000, reference 2.000\n" in out


@pytest.mark.parametrize(("text", "works"), [("return 'fa2F'", "yes, by fa2F"), ("pass", "yes")])
def test_a_trial_may_tell_how(tmp_path, text, works):
    process = subprocess.Popen(
        [sys.executable, "-c", f"def f():\n    {text}\nif s := f(): print('trial:', s)"],
        stdout=(tmp_path / "out").open("wb"),
    )
    assert trials._outcome(process, tmp_path / "out") == works


def test_it_takes_no_options(capsys):
    assert main(["doctor", "--all"]) == 2
    assert "--all: unknown key" in capsys.readouterr().err


@pytest.mark.slow
def test_this_machine():
    """Whatever is installed here is tried for real, and works: the environments of CI are whole."""
    on_cuda = torch.cuda.is_available()
    for row in examine(parts(on_cuda)):
        assert row.works.startswith("yes") or row.works in ("not installed", *["loads"] * (not on_cuda)), row
        assert bool(row.install) == (row.works == "not installed"), row
