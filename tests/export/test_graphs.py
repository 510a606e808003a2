"""Graphs of the encoder: run by what reads them, of a batch they were not traced with, they give our features."""

import json
import sysconfig
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from made_run import make_run
from tiny import images

import ccmim_fast
from ccmim_fast.cli import main
from ccmim_fast.export.targets import TARGETS
from ccmim_fast.models.tokens import tokens_of

NEAR = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def model(tmp_path):
    # With registers, without a position for [CLS].
    model, _ = make_run(tmp_path / "run", model={"arch": "vit_medium_patch16_reg4_gap_256", "depth": 2})
    return model


def as_floats(pictures):
    return pictures.permute(0, 3, 1, 2).float() / 255


def ours(model, pictures):
    with torch.no_grad():
        return tokens_of(model.encoder, model.mean_C, model.std_C)(pictures)


@pytest.mark.slow
def test_onnx_runtime_gives_our_features(model, tmp_path, monkeypatch):
    """With the weights beside the graph, as those that are too large for one file; docs/export.md runs one file."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = tmp_path / "encoder.onnx"
    monkeypatch.setattr("ccmim_fast.export.graphs._ONE_FILE", 1000)
    assert main(["export", "onnx", str(tmp_path / "run"), str(file)]) == 0
    assert file.with_name("encoder.onnx.data").exists()
    read = onnx.load(file)
    onnx.checker.check_model(read)
    assert [(o.domain, o.version) for o in read.opset_import if not o.domain] == [("", 20)]
    assert {p.key: p.value for p in read.metadata_props}["prefix_tokens"] == "5"
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        pictures = images(count)
        (tokens,) = session.run(["tokens"], {"images": as_floats(pictures).numpy()})
        torch.testing.assert_close(torch.from_numpy(tokens), ours(model, pictures), **NEAR)


@pytest.mark.slow
def test_torch_export_gives_our_features(model, tmp_path):
    assert main(["export", "torch-export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    said = {"about.json": ""}
    program = torch.export.load(tmp_path / "out" / "model.pt2", extra_files=said)
    assert json.loads(said["about.json"])["prefix_tokens"] == "5"
    for count in (1, 5):
        pictures = images(count)
        with torch.no_grad():
            tokens = program.module()(as_floats(pictures))
        torch.testing.assert_close(tokens, ours(model, pictures), **NEAR)


def contents(path):
    """All bytes of a file; of a zip archive, those of its members as well."""
    yield path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from map(archive.read, archive.namelist())


@pytest.mark.parametrize("target", TARGETS)
def test_no_file_holds_a_path_of_this_machine(tmp_path, target):
    """Neither of the sources nor of the run's folders, images and user, and no password."""
    if target == "onnx":
        pytest.importorskip("onnxscript")
    # An architecture that each target can express.
    secret = {"root": "http://joe:hunter2@example.org/set?token=abc123", "index": "/home/joe/index.arrow"}
    make_run(
        tmp_path / "run", data=secret | {"image_size": (32, 32)}, mask={"strategy": "random"}, contrast={"loss": "none"}
    )
    result = {"evaluation": "knn", "protocol": "knn", "figures": {"k=1": 0.5}, "config": {"data.root": "/home/joe/set"}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    line = ["export", target, str(tmp_path / "run"), str(tmp_path / "out"), f"--result={tmp_path / 'result.json'}"]
    assert main(line) == 0
    private = ["hunter2", "/home/joe", "site-packages", sysconfig.get_path("stdlib"), str(tmp_path), "example.org"]
    private += [str(Path(module.__file__).parent) for module in (ccmim_fast, torch, timm)]
    files = sorted((tmp_path / "out").iterdir())
    assert "README.md" in [path.name for path in files]
    for path in files:
        for content in contents(path):
            assert not [one for one in private if one.encode() in content], path.name


def test_without_onnx(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", "onnx", str(tmp_path / "run"), str(tmp_path / "encoder.onnx")]) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'ccmim_fast[export]'" in line
