"""Whole runs of the tiny model: resume, reproducibility, what a run folder holds, and who is refused."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import TINY

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.run import open_run
from ccmim_fast.config.keys import settings
from ccmim_fast.config.load import from_yaml
from ccmim_fast.engine.pretraining import fit
from ccmim_fast.errors import CcmimError, CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twenty small JPEG files of noise."""
    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for i in range(20):
        pixels = torch.randint(0, 256, (40 + i, 60, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(root / f"{i:02d}.jpg")
    return root


def config_for(run, root, **sections):
    """Four steps an epoch, two micro-batches a step."""
    sections = {
        "run": {"dir": str(run), "log_every": 1, "save_every": 1, "tensorboard": False},
        "data": {"root": str(root), "loader": "torch"},
        "train": {"epochs": 4, "batch_size": 5, "device": "cpu", "precision": "fp32"},
        "optim": {"warmup_epochs": 1.0},
        **sections,
    }
    return dataclasses.replace(
        TINY, **{name: dataclasses.replace(getattr(TINY, name), **fields) for name, fields in sections.items()}
    )


def with_fields(config, section, **fields):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


def newest_state(run):
    return io.newest(run / "checkpoints").state


def same(a, b):
    """Whether two nested states are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_ten_steps_equal_five_and_five(tmp_path, photos, loader):
    """Stopped in the middle of an epoch and resumed: weights, optimizer and EMA are equal bit for bit."""
    base = config_for(
        tmp_path / "whole",
        photos,
        data={"root": str(photos), "loader": loader, "flip": True},
        model={"drop_path": 0.2},
        optim={"ema_decay": 0.9, "clip_grad": 1.0},
    )
    base = with_fields(base, "train", max_steps=10)
    fit(base)
    parts = with_fields(base, "run", dir=str(tmp_path / "parts"))
    fit(with_fields(parts, "train", max_steps=5))
    assert newest_state(tmp_path / "parts")["progress"]["step"] == 5
    fit(with_fields(parts, "run", resume="auto"))
    whole, again = newest_state(tmp_path / "whole"), newest_state(tmp_path / "parts")
    assert whole["progress"]["step"] == again["progress"]["step"] == 10
    for part in ("model", "optimizer", "ema"):
        assert same(whole[part], again[part]), part
    figures = [[{k: r[k] for k in ("step", "loss", "lr")} for r in records(tmp_path / d)] for d in ("whole", "parts")]
    assert figures[0] == figures[1]
    assert [r["step"] for r in figures[0]] == list(range(1, 11))


@pytest.fixture(scope="module")
def banked(photos):
    """banked(folder): the settings of a run of ten steps with a bank, whose division changes from epoch to epoch."""

    def config(folder):
        sections = {
            "score": {"source": "bank", "grid": 5, "momentum": 0.5, "temperature": (2.0, 1.0)},
            "mask": {"hints": 0.2, "importance": (0.5, 1.0)},
            "teacher": {"tokens": 0.5},
            "data": {"root": str(photos), "loader": "torch", "flip": True},
        }
        found = config_for(folder, photos, **sections)
        return with_fields(found, "train", max_steps=10, accumulate=1)

    return config


@pytest.fixture(scope="module")
def whole(banked, tmp_path_factory):
    """The state after ten steps with a bank, without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    fit(banked(folder))
    return newest_state(folder)


@pytest.mark.parametrize("store", ["device", "host", "file"])
def test_a_bank_is_in_the_checkpoint(tmp_path, banked, whole, store):
    """Stopped in the second epoch and resumed, with any store: maps and weights bit for bit as without a stop."""
    parts = with_fields(banked(tmp_path), "score", store=store)
    fit(with_fields(parts, "train", max_steps=6))
    fit(with_fields(parts, "run", resume="auto"))
    again = newest_state(tmp_path)
    assert whole["maps"].shape == (20, 5, 5)
    assert whole["maps"].dtype == torch.float16
    assert bool(whole["maps"].any())
    for part in ("maps", "model", "optimizer"):
        assert same(whole[part], again[part]), part
    # Opened after 2.5 of 4 epochs it divides as in epoch 2, on two thirds of the way: 9 to 18 patches, 2 to 4 hints.
    sampling = open_run(tmp_path).model.sampling
    assert (sampling["important"], sampling["hints"], sampling["temperature"]) == (15, 3, pytest.approx(4 / 3))


def test_without_its_maps_a_run_ends_elsewhere(tmp_path, banked, whole):
    emptied = banked(tmp_path)
    fit(with_fields(emptied, "train", max_steps=6))
    io.save(tmp_path / "checkpoints", 6, {**newest_state(tmp_path), "maps": None}, keep=1)
    fit(with_fields(emptied, "run", resume="auto"))
    assert not same(whole["model"], newest_state(tmp_path)["model"])


def test_maps_of_another_grid_are_refused(tmp_path, photos):
    config = config_for(tmp_path / "run", photos, score={"source": "bank", "grid": 5})
    fit(with_fields(config, "train", max_steps=1))
    with pytest.raises(CheckpointError, match=r"score\.grid=6: the checkpoint is of another model; use 5"):
        fit(with_fields(with_fields(config, "score", grid=6), "run", resume="auto"))


def test_equal_seeds_equal_runs_and_other_seeds_differ(tmp_path, photos):
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = dataclasses.replace(config_for(tmp_path / name, photos), seed=seed)
        fit(with_fields(config, "train", max_steps=2))
        states.append(newest_state(tmp_path / name)["model"])
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_loss_falls(tmp_path, photos):
    """Twenty steps on twenty images: the model learns."""
    config = config_for(tmp_path / "run", photos, optim={"warmup_epochs": 1.0, "base_lr": 0.1})
    config = with_fields(config, "train", epochs=10, batch_size=10)
    fit(config)
    losses = [r["recons"] for r in records(tmp_path / "run")]
    assert sum(losses[-4:]) / 4 < 0.95 * sum(losses[:4]) / 4


def test_run_folder_explains_itself(tmp_path, photos):
    config = with_fields(config_for(tmp_path / "run", photos), "train", max_steps=2)
    config = with_fields(config, "run", tensorboard=True)
    fit(config)
    run = tmp_path / "run"
    assert from_yaml((run / "config.yaml").read_text(), "config.yaml") == config
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__.split("+")[0] or environment["torch"] == torch.__version__
    assert {"python", "device", "commit", "command", "timm"} <= environment.keys()
    assert list((run / "tensorboard").glob("events*"))
    keys = {"loss", "recons", "contrast", "lr", "images_per_second", "data_wait", "mfu", "eta_seconds", "epoch"}
    assert keys <= records(run)[-1].keys()


def test_accumulation_gives_the_reconstruction_gradient_of_one_batch(tmp_path, photos):
    """Without a contrastive half, micro-batches are one batch: same weights after a step, to float32 rounding."""
    states = []
    for name, accumulate in (("one", 1), ("two", 2)):
        config = config_for(tmp_path / name, photos, contrast={"loss": "none"}, optim={"warmup_epochs": 0.0})
        fit(with_fields(config, "train", batch_size=10, accumulate=accumulate, max_steps=1))
        states.append(newest_state(tmp_path / name)["model"])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6)


def test_progress_lines_when_not_a_terminal(tmp_path, photos, capsys):
    fit(with_fields(config_for(tmp_path / "run", photos), "train", max_steps=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if "step 2/2" in line]
    assert len(lines) == 1
    assert all(word in lines[0] for word in ("epoch", "loss", "recons", "contrast", "lr", "img/s", "data wait", "ETA"))


def test_headline_says_what_was_left_out(tmp_path, photos, capsys):
    root = tmp_path / "images"
    shutil.copytree(photos, root)
    (root / "broken.jpg").write_bytes(b"no image")
    config = with_fields(config_for(tmp_path / "run", root), "train", max_steps=1)
    with pytest.raises(DataError, match=r"^1 of 21 samples cannot be used, more than data\.max_bad=0\.01"):
        fit(config)
    fit(with_fields(with_fields(config, "data", max_bad=0.1), "run", overwrite=True))
    _, left_out, headline, *_ = capsys.readouterr().out.splitlines()  # each call tells it first
    assert all(words in left_out for words in ("1 left out: ", "broken.jpg"))
    assert all(words in headline for words in ("20 images", "TorchLoader", "fp32"))


def test_a_closed_pipe_does_not_end_the_run(tmp_path, photos):
    """As in `ccmim pretrain ... | head -1`."""
    run = tmp_path / "run"
    settings = ["--data.image_size=[32,32]", "--model.arch=test_vit", "--decoder.dim=32", "--train.batch_size=5"]
    settings += ["--train.max_steps=6", "--run.log_every=1", "--train.device=cpu", "--data.loader=torch"]
    settings += [f"--data.root={photos}", f"--run.dir={run}", "--run.tensorboard=false"]
    command = [sys.executable, "-m", "ccmim_fast.cli", "pretrain", *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "20 images" in process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 0, errors
    assert "BrokenPipe" not in errors
    assert newest_state(run)["progress"]["step"] == 6


def test_fault_22_occupied_folder_is_refused_before_anything_is_built(tmp_path):
    (tmp_path / "old.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"not empty, and no run of ccmim: it holds 'old\.txt'; choose another folder"
    ):
        fit(config_for(tmp_path, "nowhere"))
    assert [p.name for p in tmp_path.iterdir()] == ["old.txt"]


def test_fault_22_overwriting_waits_until_all_is_checked_and_spares_what_no_run_wrote(tmp_path, photos):
    run = tmp_path / "run"
    config = with_fields(config_for(run, photos), "train", max_steps=1)
    fit(config)
    with pytest.raises(ConfigError, match=r"not empty; use --resume auto to go on, or --overwrite"):
        fit(config)
    (run / "old.txt").write_text("mine")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    anew = with_fields(config, "run", overwrite=True)
    for wrong in (
        with_fields(anew, "data", root=str(photos) + "o"),
        with_fields(anew, "train", batch_size=64),
        with_fields(anew, "train", profile=5),
        with_fields(anew, "run", resume=str(tmp_path / "nowhere")),
    ):
        with pytest.raises(CcmimError):
            fit(wrong)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    fit(with_fields(anew, "train", max_steps=2))
    assert (run / "old.txt").read_text() == "mine"
    assert [path.name for path in io.checkpoints(run / "checkpoints")] == ["step_00000002"]


@pytest.mark.parametrize("where", ["/proc/nowhere/run", "file/run"])
def test_fault_22_folder_that_cannot_be_written(tmp_path, photos, where, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written: .*; choose another folder"):
        fit(config_for(where, photos))


@pytest.mark.parametrize(
    ("files", "message"),
    [([], "no .*image"), ([("a.jpg", b"text")], "no .*image"), (None, "")],
)
def test_fault_5_no_images(tmp_path, files, message):
    root = tmp_path / "images"
    if files is not None:
        root.mkdir()
        for name, content in files:
            (root / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        fit(config_for(tmp_path / "run", root))
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value)


def test_fault_5_fewer_images_than_a_batch(tmp_path, photos):
    config = with_fields(config_for(tmp_path / "run", photos), "train", batch_size=64)
    with pytest.raises(DataError, match=r"20 images are fewer than train\.batch_size=64; set train\.batch_size=20"):
        fit(config)


def test_fault_12_damaged_newest_checkpoint_falls_back_and_says_so(tmp_path, photos, capsys):
    config = with_fields(config_for(tmp_path / "run", photos), "train", max_steps=8)
    fit(config)
    newest = io.checkpoints(tmp_path / "run" / "checkpoints")[-1]
    state = newest / io.STATE
    state.write_bytes(state.read_bytes()[:-100])
    fit(with_fields(config, "run", resume="auto"))
    assert "skipped the checkpoint" in capsys.readouterr().out
    assert newest_state(tmp_path / "run")["progress"]["step"] == 8
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        fit(with_fields(config, "run", resume=str(newest)))


def test_fault_14_what_changed_is_told_and_must_be_allowed(tmp_path, photos, capsys):
    config = with_fields(config_for(tmp_path / "run", photos), "train", max_steps=2)
    fit(config)
    again = with_fields(config, "run", resume="auto", log_every=2)
    fit(with_fields(with_fields(again, "train", max_steps=3), "data", workers=2))
    told = capsys.readouterr().out.splitlines()
    at = told.index("changed since the checkpoint  then  now")
    assert [line.split() for line in told[at + 1 : at + 3]] == [
        ["data.workers", "0", "2"],
        ["train.max_steps", "2", "3"],
    ]
    for section, field, value, before in (
        ("optim", "base_lr", 1e-3, "0.00015"),
        ("train", "batch_size", 10, "5"),
        ("train", "epochs", 5, "4"),
        ("mask", "ratio", 0.5, "0.75"),
    ):
        other = with_fields(with_fields(again, "train", max_steps=4), section, **{field: value})
        message = f"{section}.{field}={value}: the checkpoint has {before}; use that, or --allow-change"
        with pytest.raises(ConfigError, match=re.escape(message)):
            fit(other)
        told = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [f"{section}.{field}", before, str(value), "needs", "--allow-change"] in told
        fit(with_fields(with_fields(other, "run", allow_change=True), "train", max_steps=3))
    assert newest_state(tmp_path / "run")["progress"]["step"] == 3


def test_what_is_allowed_to_change_does(tmp_path, photos):
    """The optimizer's groups are in the checkpoint; decay and betas are the run's."""
    config = with_fields(config_for(tmp_path / "run", photos), "train", max_steps=2)
    fit(config)
    again = with_fields(with_fields(config, "run", resume="auto", allow_change=True), "train", max_steps=3)
    fit(with_fields(again, "optim", weight_decay=0.3, betas=(0.5, 0.6)))
    groups = newest_state(tmp_path / "run")["optimizer"]["param_groups"]
    assert sorted({group["weight_decay"] for group in groups}) == [0, 0.3]
    assert all(tuple(group["betas"]) == (0.5, 0.6) for group in groups)


def test_fewer_steps_than_were_taken_are_none(tmp_path, photos):
    config = with_fields(config_for(tmp_path / "run", photos), "train", max_steps=3)
    fit(config)
    fit(with_fields(with_fields(config, "run", resume="auto"), "train", max_steps=2))
    assert newest_state(tmp_path / "run")["progress"]["step"] == 3


def test_a_place_that_another_batch_left_between_shards_is_moved_to_the_next(tmp_path, photos):
    """After 3 steps of 5 of 20 samples in one shard: with 2 shards steps begin at even places."""
    config = config_for(tmp_path / "run", photos, score={"source": "bank", "shards": 1})
    fit(with_fields(config, "train", max_steps=3))
    again = with_fields(with_fields(config, "run", resume="auto", allow_change=True), "score", shards=2)
    fit(with_fields(again, "train", batch_size=4, max_steps=5))
    progress = newest_state(tmp_path / "run")["progress"]
    assert (progress["step"], progress["seen"]) == (5, 16 + 2 * 4)


def test_every_setting_is_free_refused_or_asked_for():
    """A new setting must be allowed, unless its field says otherwise."""
    kinds = {key: setting.on_resume for key, setting in settings().items()}
    assert set(kinds.values()) == {"free", "shape", "asked"}
    assert {kinds[key] for key in ("run.dir", "train.device")} == {"free"}
    assert {
        kinds[key] for key in ("seed", "train.batch_size", "score.momentum", "teacher.tokens", "data.crop_scale")
    } == {"asked"}


def test_the_page_names_every_setting_that_is_refused():
    text = (Path(__file__).parents[2] / "docs" / "long-runs.md").read_text()
    [row] = [line for line in text.splitlines() if line.startswith("| settings that say which model")]
    known, named = settings(), set()
    for pattern, but in re.findall(r"`([\w.*]+)`(?: but `([\w.]+)`)?", row.split("|")[1]):
        named |= {key for key in known if fnmatch(key, pattern)} - {but}
    assert named == {key for key, setting in known.items() if setting.on_resume == "shape"}


def test_a_setting_of_the_optimizer_is_refused_as_such(tmp_path, photos):
    config = with_fields(config_for(tmp_path / "run", photos), "train", max_steps=1)
    fit(config)
    other = with_fields(with_fields(config, "optim", decay_tokens=True), "run", resume="auto", allow_change=True)
    with pytest.raises(CheckpointError, match="decay_tokens=true: the checkpoint is of another optimizer; use false"):
        fit(other)


def test_fault_14_resume_of_another_model_is_refused(tmp_path, photos, capsys):
    config = with_fields(config_for(tmp_path / "run", photos), "train", max_steps=1)
    fit(config)
    other = with_fields(with_fields(config, "model", depth=2), "run", resume="auto")
    with pytest.raises(CheckpointError, match=r"model\.depth=2: the checkpoint is of another model; use 3"):
        fit(other)
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model.depth", "3", "2", "another", "model"] in told
