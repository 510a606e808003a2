"""What a run does without libraries, with constant images, a failing compiler or TensorBoard (faults 21, 24 to 26)."""

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tiny import tiny_config
from torch._inductor import config as inductor
from torch._inductor.codegen import cpp
from torch.utils import tensorboard

from ccmim_fast.data.stream import dali_loader
from ccmim_fast.engine import compile as compiled
from ccmim_fast.engine.build import build_step
from ccmim_fast.engine.dry_run import synthetic_batch
from ccmim_fast.engine.pretraining import fit
from ccmim_fast.ranks.session import Session
from ccmim_fast.registry import CONTRASTS

CPU = Session(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def no_counting(monkeypatch):
    """The FLOP counter takes a step of its own before the run."""
    monkeypatch.setattr("ccmim_fast.engine.pretraining.count_flops", lambda step: {})


def config_for(tmp_path, **sections):
    """Two steps an epoch, two epochs."""
    sections = {
        "run": {"dir": str(tmp_path / "run"), "log_every": 1, "tensorboard": False},
        "data": {"source": "shapes", "samples": 8, "root": str(tmp_path / "shapes"), "loader": "torch"},
        "train": {"epochs": 2, "batch_size": 4, "device": "cpu", "precision": "fp32"},
        "optim": {"warmup_epochs": 0.0},
        **sections,
    }
    return tiny_config(**sections)


def records(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


# Fault 21: nothing but a CPU


def made_images(folder):
    folder.mkdir()
    for number in range(8):
        Image.new("RGB", (40, 40), (255 * (number % 2),) * 3).save(folder / f"{number}.png")
    return str(folder)


@pytest.mark.parametrize("has_dali", [False, True])
@pytest.mark.parametrize("has_bf16", [False, True])
def test_fault_21_the_next_best_runs_and_the_first_line_says_which(tmp_path, monkeypatch, capsys, has_dali, has_bf16):
    if has_dali and not dali_loader.is_installed():
        pytest.skip("DALI is not installed")
    for module, name, value in (
        (torch.cuda, "is_available", False),
        (torch.cpu, "_is_avx512_bf16_supported", has_bf16),
        (dali_loader, "is_installed", has_dali),
    ):
        monkeypatch.setattr(module, name, lambda value=value: value)
    for library in ("xformers", "xformers.ops", "apex", "apex.optimizers"):
        monkeypatch.setitem(sys.modules, library, None)
    train = {"epochs": 1, "batch_size": 4}  # all the rest on auto
    fit(config_for(tmp_path, data={"root": made_images(tmp_path / "images")}, train=train))
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(
        f"8 images · {'DaliLoader' if has_dali else 'TorchLoader'} · 1 x cpu, {'bf16' if has_bf16 else 'fp32'} · "
    )
    assert len(records(tmp_path)) == 2


# Fault 24: constant images


def constant_batch(step, value):
    """Four images of one value: all patches are equal, and all images too."""
    batch = synthetic_batch(step, 4)
    return batch._replace(images_BHWC=torch.full_like(batch.images_BHWC, value))


@pytest.mark.parametrize(("kind", "precision"), [("pixels", "fp32"), ("hog", "bf16")])
@pytest.mark.parametrize("contrast", [name for name, loss in CONTRASTS.items() if loss.path])
@pytest.mark.parametrize("source", ["first", "all", "bank"])
def test_fault_24_a_step_on_constant_images_is_finite(source, contrast, kind, precision):
    # One mean and deviation for all channels: with ImageNet's, a gray patch has some variance over its channels.
    config = tiny_config(
        data={"image_size": (32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)},
        score={"source": source},
        contrast={"loss": contrast},
        target={"kind": kind},
        optim={"base_lr": 1e-2},
        train={"batch_size": 4, "precision": precision},
    )
    step = build_step(config, CPU)
    before = [p.clone() for p in step.model.parameters() if p.requires_grad]
    for value in (0, 128, 255):
        result = step([constant_batch(step, value)], lr=1e-3)
        assert all(math.isfinite(figure) for figure in result[:3])
        assert math.isfinite(result.gradients.norm)
        assert not result.gradients.bad
        assert int(result.nan_id) == -1
        assert result.seen[0].mask_BL.sum(1).tolist() == [12] * 4
    after = [p for p in step.model.parameters() if p.requires_grad]
    assert all(bool(p.isfinite().all()) for p in after)
    assert any(not torch.equal(p, q) for p, q in zip(before, after))


def masks_of_ties(strategy, seed):
    """Without positions all patches of a constant image have one score."""
    config = tiny_config(
        data={"image_size": (32, 32)},
        mask={"strategy": strategy},
        train={"batch_size": 4, "precision": "fp32"},
    )
    step = build_step(type(config)(**{**vars(config), "seed": seed}), CPU)
    with torch.no_grad():
        step.model.encoder.pos_embed.zero_()
    result = step([constant_batch(step, 128)], lr=0.0)
    assert float(result.entropy) == pytest.approx(1, abs=1e-5), "the scores are not tied: the test tests nothing"
    return result.seen[0].mask_BL


def test_fault_24_ties_are_broken_by_the_seed():
    one, same, other = (masks_of_ties("importance_sampling", seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert any(not torch.equal(a, b) for a, b in itertools.pairwise(one)), "each sample has its own noise"
    # Without noise the first patches are masked: by their index, for every seed.
    assert torch.equal(masks_of_ties("importance", 0), (torch.arange(16) < 12).expand(4, 16))
    assert torch.equal(masks_of_ties("importance", 0), masks_of_ties("importance", 1))


def test_fault_24_a_run_on_constant_images_skips_no_step(tmp_path):
    root = made_images(tmp_path / "images")
    fit(config_for(tmp_path, data={"root": root, "loader": "torch"}, score={"source": "bank"}))
    assert {record["kind"] for record in records(tmp_path)} <= {"train", "collapse"}
    assert all(math.isfinite(record["loss"]) for record in records(tmp_path) if record["kind"] == "train")


# Fault 25: torch.compile fails


@pytest.mark.parametrize(
    ("what", "when"),
    [
        ("blocks", "no compiler"),
        pytest.param("step", "no compiler", marks=pytest.mark.slow),
        ("blocks", "no torch.compile"),
        ("step", "no torch.compile"),
        ("blocks", "no code for a node"),
    ],
)
def test_fault_25_the_run_goes_on_eagerly_after_one_line(tmp_path, monkeypatch, capsys, what, when):
    """Inductor's C++ compiler is missing, which the first call tells; or it has no code for a node, which it logs at
    length as well; or torch.compile itself refuses this Python."""

    def refuses(*args, **options):
        raise RuntimeError("torch.compile is not supported on\nPython 3.99")

    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    if when == "no torch.compile":
        monkeypatch.setattr(compiled.torch, "compile", refuses)
    if when == "no code for a node":
        monkeypatch.setattr(cpp.CppKernel, "load", refuses)
    train = {"epochs": 1, "batch_size": 4, "device": "cpu", "precision": "fp32", "compile": what}
    compiler = inductor.cpp.cxx if when == "no code for a node" else (None, str(tmp_path / "no-such-compiler"))
    with inductor.patch({"cpp.cxx": compiler}):
        fit(config_for(tmp_path, train=train))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1, told
    assert told[0].startswith("train.compile failed, the run goes on without: ")
    assert len(records(tmp_path)) == 2


# Fault 26: TensorBoard fails


class BrokenBoard:
    """Its third figure finds the disk full; its close does, too."""

    def __init__(self, *args, error=None, **options):
        self.left, self.error = 3, error

    def add_scalar(self, *args):
        self.left -= 1
        if self.left <= 0:
            raise self.error

    def close(self):
        raise self.error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), TypeError("Descriptors cannot\nbe created")])
@pytest.mark.parametrize("when", ["at once", "in the middle"])
def test_fault_26_the_run_goes_on_and_its_records_are_whole(tmp_path, monkeypatch, capsys, error, when):
    def board(*args, **options):
        if when == "at once":
            raise error
        return BrokenBoard(error=error)

    monkeypatch.setattr(tensorboard, "SummaryWriter", board)
    fit(config_for(tmp_path, run={"dir": str(tmp_path / "run"), "log_every": 1, "tensorboard": True}))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1, told
    assert told[0].startswith(f"TensorBoard is off, metrics.jsonl goes on: {type(error).__name__}: ")
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]


def test_fault_26_tensorboard_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    fit(config_for(tmp_path, run={"dir": str(tmp_path / "run"), "log_every": 1, "tensorboard": True}))
    assert capsys.readouterr().err.startswith("TensorBoard is off, metrics.jsonl goes on: ModuleNotFoundError: ")
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]


FULL = """
import errno, json, os, sys
from pathlib import Path
from tensorboard.compat.tensorflow_stub.io import gfile
from ccmim_fast.runs.metrics import Metrics

def full(self, *args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

metrics = Metrics(Path(sys.argv[1]), tensorboard=True)
for step in range(1, 41):
    if step == 5:
        gfile.GFile.write = full
    metrics.write("train", step, loss=1.0, recons=2.0)
metrics.close()
"""


def test_fault_26_the_disk_of_the_event_files_is_full(tmp_path):
    """TensorBoard's own thread dies of it, in the middle of what waits to be written."""
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("TensorBoard is off") == 1
    assert "No space left on device" in done.stderr
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 41))
