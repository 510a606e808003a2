"""A run that goes on keeps its place: with more or fewer images, another batch, unreadable or damaged checkpoints."""

import dataclasses
import errno
import json
import os

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config

from ccmim_fast.checkpoints import io, manifest
from ccmim_fast.checkpoints.state import restore
from ccmim_fast.engine.pretraining import fit
from ccmim_fast.errors import CheckpointError, UnreadableError
from ccmim_fast.runs.state import read_state, write_state


@pytest.fixture(autouse=True)
def no_counting(monkeypatch):
    """The FLOP counter takes a step of its own before the run."""
    monkeypatch.setattr("ccmim_fast.engine.pretraining.count_flops", lambda step: {})


def config_for(tmp_path, seed=0, **sections):
    sections = {
        "run": {"dir": str(tmp_path / "run"), "log_every": 1, "tensorboard": False, "save_every": 1},
        "data": {"root": str(tmp_path / "images"), "loader": "torch", "image_size": (16, 16)},
        "train": {"epochs": 4, "batch_size": 4, "device": "cpu", "precision": "fp32", "autotune": "off"},
        **sections,
    }
    return dataclasses.replace(tiny_config(**sections), seed=seed)


def going_on(config, **fields):
    fields = {"max_steps": 0, **fields}
    run = dataclasses.replace(config.run, resume="auto", allow_change=True)
    return dataclasses.replace(config, run=run, train=dataclasses.replace(config.train, **fields))


def make_images(folder, count):
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for number in range(count):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(folder / f"{number}.png")


def records(tmp_path):
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "train"]


@pytest.mark.parametrize(("before", "now", "steps"), [(8, 24, 12), (24, 8, 4), (8, 12, 6), (16, 10, 5)])
def test_a_set_that_grew_or_shrank_keeps_the_place_in_the_schedule(tmp_path, capsys, before, now, steps):
    make_images(tmp_path / "images", before)
    config = config_for(tmp_path, score={"source": "bank"})
    fit(dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=before // 2)))
    then = records(tmp_path)[-1]
    assert then["epoch"] == 2
    make_images(tmp_path / "images", now)
    fit(going_on(config))
    after = records(tmp_path)[before // 2 :]
    assert after[0]["epoch"] == pytest.approx(2 + 4 / now)
    assert len(after) == steps, "two epochs of the images that there are now"
    # Half a cosine: at epoch 2 of 4 half of the peak, whatever the images.
    assert after[0]["lr"] == pytest.approx(config.optim.base_lr * 4 / 256 / 2)
    assert then["lr"] > after[0]["lr"] > after[1]["lr"]
    assert read_state(tmp_path / "run").state == "done"
    told = capsys.readouterr().out
    assert f"({before} then, {now} now); it goes on at epoch 2.00 of 4, each of them has {now} images now" in told
    assert "the score maps begin anew, as those of the checkpoint are of other images" in told


def test_a_set_that_changes_within_an_epoch_and_a_batch_that_does_too(tmp_path):
    make_images(tmp_path / "images", 12)
    config = config_for(tmp_path)
    fit(dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=4)))  # 16 of 12: epoch 1.33
    make_images(tmp_path / "images", 24)
    fit(going_on(config, batch_size=8))
    after = records(tmp_path)[4:]
    assert after[0]["epoch"] == pytest.approx(32 / 24 + 8 / 24)
    assert len(after) == 8  # 64 of 96 samples are left


def test_a_run_that_was_done_goes_on_with_more_epochs_and_ends_with_fewer(tmp_path):
    make_images(tmp_path / "images", 8)
    fit(config_for(tmp_path))
    make_images(tmp_path / "images", 16)
    fit(going_on(config_for(tmp_path)))
    assert len(records(tmp_path)) == 8, "all its epochs are behind it"
    fit(going_on(config_for(tmp_path), epochs=5))
    assert [record["epoch"] for record in records(tmp_path)[8:]] == [4.25, 4.5, 4.75, 5.0]
    fit(going_on(config_for(tmp_path), epochs=2))
    assert len(records(tmp_path)) == 12
    assert read_state(tmp_path / "run").state == "done"


def test_seeds_up_to_the_last_train_with_stochastic_depth_and_differ(tmp_path):
    losses = set()
    for number, seed in enumerate((0, 2**24, 2**32 - 2, 2**32 - 1)):
        shapes = {"source": "shapes", "samples": 8, "root": str(tmp_path / "shapes"), "loader": "torch"}
        run = {"dir": str(tmp_path / f"run{number}"), "tensorboard": False, "log_every": 1}
        config = config_for(tmp_path, seed, run=run, data=shapes, model={"drop_path": 0.5}, score={"source": "bank"})
        folder = fit(dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=1)))
        losses.add(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert len(losses) == 4


def test_tensorboard_keeps_the_step_of_the_checkpoint(tmp_path):
    make_images(tmp_path / "images", 8)
    config = config_for(tmp_path, run={"dir": str(tmp_path / "run"), "log_every": 1, "tensorboard": True})
    for steps in (2, 3, 0):
        fit(going_on(config, max_steps=steps))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.fixture
def stopped(tmp_path):
    """A run with the checkpoints of steps 2 and 4 of 8."""
    make_images(tmp_path / "images", 8)
    config = config_for(tmp_path)
    fit(dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=4)))
    return config


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("code", "where"), [(errno.EMFILE, "listed"), (errno.EACCES, "manifest"), (errno.EIO, "state")]
)
def test_a_moment_in_which_no_checkpoint_can_be_read_changes_nothing(tmp_path, stopped, monkeypatch, code, where):
    before = contents(tmp_path)

    def fails(path, *rest):
        raise OSError(code, os.strerror(code), str(path))

    if where == "listed":
        scandir = os.scandir
        listed = lambda path: fails(path) if str(path).endswith("checkpoints") else scandir(path)  # noqa: E731
        monkeypatch.setattr(manifest.os, "scandir", listed)
    else:
        module, name = (manifest, manifest.MANIFEST) if where == "manifest" else (io, io.STATE)
        open_file = manifest.open_file
        monkeypatch.setattr(module, "open_file", lambda path: fails(path) if path.name == name else open_file(path))
    with pytest.raises(UnreadableError, match=f"checkpoints.*cannot be read: {os.strerror(code)}") as caught:
        fit(going_on(stopped))
    assert caught.value.exit_code == 5
    monkeypatch.undo()
    assert contents(tmp_path) == before
    fit(going_on(stopped))
    assert [record["step"] for record in records(tmp_path)] == [*range(1, 9)]


def test_where_every_checkpoint_is_damaged_nothing_begins_anew(tmp_path, stopped):
    for path in io.checkpoints(tmp_path / "run" / "checkpoints"):
        os.truncate(path / io.STATE, 100)
    before = contents(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"none of its checkpoints loads: .*step_00000004: .*step_00000002: .*anew"
    ):
        fit(going_on(stopped))
    assert contents(tmp_path) == before
    fit(dataclasses.replace(stopped, run=dataclasses.replace(stopped.run, overwrite=True)))
    assert len(records(tmp_path)) == 8


def test_checkpoints_that_are_gone_are_no_new_run(tmp_path, stopped):
    """Moved away by hand, or on a disk that is not mounted."""
    folder = tmp_path / "run" / "checkpoints"
    state = read_state(tmp_path / "run")
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    with pytest.raises(UnreadableError, match=r"checkpoints: links to .*nowhere, which is not there"):
        fit(going_on(stopped))
    folder.unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in it, though state\.json says that the run was done"):
        fit(going_on(stopped))
    assert contents(tmp_path) == before
    write_state(tmp_path / "run", state._replace(state="running", exit_code=None, started=1))  # killed before a save
    fit(going_on(stopped, max_steps=1))
    assert len(records(tmp_path)) == 1


def test_memory_that_is_gone_is_not_taken_for_a_damaged_checkpoint(tmp_path, stopped, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")

    monkeypatch.setattr(io.torch, "load", fails)
    with pytest.raises(RuntimeError, match="can't allocate"):
        io.newest(tmp_path / "run" / "checkpoints")


class Few(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 3))
        self.bias = torch.nn.Parameter(torch.ones(4))


def state_of(optimizer_of):
    model = Few()
    optimizer = optimizer_of(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    progress = {"step": 1, "seen": 4, "samples": 4, "images": "x", "shards": 1}
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {}, "progress": progress}


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}


def restored(state, name, in_place=False):
    model = Few()
    optimizer = OPTIMIZERS[name](model.parameters())
    return restore(state, model, optimizer, torch.amp.GradScaler("cpu", enabled=False), None, in_place)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_the_run_itself_load(name):
    assert restored(state_of(OPTIMIZERS[name]), name).step == 1


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("adamw", "exp_avg", torch.ones(1)),
        ("adamw", "exp_avg", torch.ones(3, 4)),
        ("adamw", "exp_avg_sq", torch.ones(4, 3).long()),
        ("adamw", "exp_avg", torch.ones(())),
        ("adamw", "step", torch.ones(4, 3)),
        ("adamw", "exp_avg", "text"),
        ("sgd", "momentum_buffer", torch.ones(12)),
        ("sgd", "momentum_buffer", torch.ones(4, 3, dtype=torch.complex64)),
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_moments_that_do_not_fit_their_weights_are_refused(name, key, value, in_place):
    state = state_of(OPTIMIZERS[name])
    state["optimizer"]["state"][0][key] = value
    with pytest.raises(CheckpointError, match=f"of another model: {key} of parameter 0 is"):
        restored(state, name, in_place)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("optimizer", "state"), {7: {}}),
        (("optimizer", "state"), []),
        (("optimizer", "param_groups"), [{"params": [0]}]),
        (("progress", "step"), -1),
        (("progress", "seen"), 4.5),
        (("progress", "samples"), "many"),
        (("progress", "more"), 1),
        (("model", "weight"), torch.ones(())),
        (("scaler",), {"scale": "text"}),
    ],
)
def test_other_parts_that_do_not_fit_are_one_line(path, value):
    state = state_of(OPTIMIZERS["adamw"])
    *above, last = path
    inner = state
    for key in above:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(CheckpointError, match=r"^the checkpoint is of another model: [^\n]+$"):
        restored(state, "adamw")
