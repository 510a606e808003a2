"""A run is opened in one way: every command sees the same weights, the averaged ones where there are some."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from made_run import make_run
from PIL import Image
from safetensors.torch import load_file

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.run import open_run
from ccmim_fast.cli import main
from ccmim_fast.errors import CheckpointError

SHAPES = {"source": "shapes", "samples": 12, "workers": 1, "image_size": (32, 48)}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_averaged_weights_or_the_trained_ones(tmp_path):
    model, config = make_run(tmp_path, averaged=True)
    run = open_run(tmp_path)
    assert (run.step, run.epoch, run.samples, run.averaged, run.config) == (7, 7, 4, True, config)
    assert same(run.weights, model.state_dict())
    assert same(run.model.state_dict(), model.state_dict())
    trained = open_run(tmp_path, weights="trained")
    assert not trained.averaged
    assert not any(value.any() for value in trained.weights.values())
    of_checkpoint = open_run(str(run.path))
    assert (of_checkpoint.path, of_checkpoint.folder) == (run.path, tmp_path)


def test_damage_is_told(tmp_path):
    make_run(tmp_path)
    whole = io.load(tmp_path / "checkpoints" / "step_00000007")
    io.save(tmp_path / "checkpoints", 9, whole, keep=5)
    (tmp_path / "checkpoints" / "step_00000009" / "state.pt").write_bytes(b"half")
    run = open_run(tmp_path)
    assert run.path.name == "step_00000007"
    assert "step_00000009: state.pt is damaged" in run.skipped[0]
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
        open_run(tmp_path / "checkpoints" / "step_00000009")
    for key in ("config", "ema", "progress"):
        io.save(tmp_path / "other" / "checkpoints", 1, {k: v for k, v in whole.items() if k != key}, keep=1)
        with pytest.raises(CheckpointError, match="not a checkpoint of pretraining"):
            open_run(tmp_path / "other")
    whole["model"]["encoder.norm.bias"] = torch.zeros(3)
    io.save(tmp_path / "other" / "checkpoints", 1, whole, keep=1)
    with pytest.raises(CheckpointError, match=r"weights do not fit the settings: .*encoder\.norm\.bias"):
        _ = open_run(tmp_path / "other").model


def knn(run, out, photos):
    few = ["--data.source=shapes", "--data.samples=24", "--data.test_samples=24", "--data.image_size=[32,48]"]
    options = [f"--run.dir={out}", "--knn.k=[1,5]", "--train.device=cpu"]
    assert main(["eval", "knn", str(run), *few, *options]) == 0
    return json.loads((out / "result.json").read_text())["figures"]


def masks(run, out, photos):
    assert main(["eval", "masks", str(run), f"--run.dir={out}", "--measure=6", "--train.device=cpu"]) == 0
    return json.loads((out / "result.json").read_text())["sources"]


def exported(run, out, photos):
    assert main(["export", "timm", str(run), str(out)]) == 0
    return {name: value.tolist() for name, value in load_file(out / "model.safetensors").items() if "bias" in name}


def embedded(run, out, photos):
    assert main(["embed", str(run), str(photos), "--out", str(out / "x.npy"), "--device=cpu"]) == 0
    return np.load(out / "x.npy").tolist()


def reported(run, out, photos):
    assert main(["report", str(run), "--out", str(out / "page.html"), "--images=2"]) == 0
    return [base64.b64decode(data) for data in re.findall(r'src="data:[^,]*,([^"]*)"', (out / "page.html").read_text())]


@pytest.mark.parametrize("command", [knn, masks, exported, embedded, reported])
def test_every_command_takes_the_averaged_weights(command, tmp_path):
    """A run whose weights of the last step are zero is seen as the run whose weights are the averages."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        Image.new("RGB", (48, 32), (80 * i, 40, 90)).save(photos / f"{i}.png")
    torch.manual_seed(0)
    model, _ = make_run(tmp_path / "averaged", averaged=True, data=SHAPES)
    state = io.load(tmp_path / "averaged" / "checkpoints" / "step_00000007")
    last, averages = state["model"], model.state_dict()
    seen = {}
    for name, weights in (("trained", averages), ("zero", last)):
        io.save(tmp_path / name / "checkpoints", 7, {**state, "model": weights, "ema": None}, keep=1)
    for name in ("averaged", "trained", "zero"):
        (tmp_path / name / "metrics.jsonl").touch()
        seen[name] = command(tmp_path / name, tmp_path / f"{name}_out", photos)
    assert seen["averaged"]
    assert seen["averaged"] == seen["trained"]
    assert seen["averaged"] != seen["zero"]
