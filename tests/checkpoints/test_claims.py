"""Weights that claim more than they hold are refused before a model is built of them."""

import argparse
import json
import os
import re
import struct

import pytest
import torch
from made_run import make_run
from safetensors.torch import save_file
from tiny import tiny_model

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.run import open_run
from ccmim_fast.cli import main
from ccmim_fast.config.load import to_yaml
from ccmim_fast.errors import CheckpointError
from ccmim_fast.evaluation.encoders import build_encoder, read_encoder
from ccmim_fast.models import ccmim

ARCH = "vit_tiny_patch16_224"


@pytest.fixture
def weights():
    model, _ = tiny_model(torch.float32)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def nothing_is_built(weights, monkeypatch):
    for place in ("ccmim_fast.export.imported.build_model", "ccmim_fast.checkpoints.run.build_model"):
        monkeypatch.setattr(place, lambda *_: pytest.fail("a model was built"))
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("a model was built"))


def imported(folder, capsys, name="file.pth"):
    code = main(["import", str(folder / name), "--arch", ARCH, "--out", str(folder / "run")])
    [line] = capsys.readouterr().err.splitlines()
    assert not (folder / "run").exists()
    return code, line


def blocks_without_number(weights):
    weights["encoder.blocks.99999.norm1.weight"] = torch.zeros(48)


def blocks_by_the_thousand(weights):
    one = torch.zeros(4 * 48 * 48)
    weights |= {f"encoder.blocks.{number}.attn.qkv.weight": one for number in range(3, 1000)}


def blocks_that_are_no_numbers(weights):
    weights["decoder.blocks.first.norm1.weight"] = torch.zeros(32)


def a_block_of_no_numbers(weights):
    for name in [name for name in weights if name.startswith("encoder.blocks.1.")]:
        weights[name] = torch.zeros(1).expand(weights[name].shape)


def a_width_without_blocks_for_it(weights):
    weights["encoder.patch_embed.proj.weight"] = torch.zeros(65536, 3, 1, 1)


def a_decoder_without_blocks_for_it(weights):
    weights["decoder.embed.weight"] = torch.zeros(60000, 48)


def a_kernel_without_dimensions(weights):
    weights["encoder.patch_embed.proj.weight"] = torch.tensor(1.0)


def positions_without_dimensions(weights):
    weights["encoder.pos_embed"] = torch.tensor(1.0)


def a_decoder_without_dimensions(weights):
    weights["decoder.embed.weight"] = torch.tensor(1.0)


def a_projector_without_dimensions(weights):
    weights["projector.3.weight"] = torch.tensor(1.0)


def a_patch_of_no_pixels(weights):
    weights["encoder.patch_embed.proj.weight"] = torch.zeros(48, 3, 0, 0)


def a_predictor_that_is_too_small(weights):
    weights["projector.3.weight"] = torch.zeros(60000, 1)
    weights["predictor.0.weight"] = torch.zeros(8)


CLAIMS = {
    blocks_without_number: r"4 blocks in its encoder, '99999' among them; expected 0, 1, \.\.\. without a gap",
    blocks_by_the_thousand: r"1000 blocks in its encoder, .* 512 at most",
    blocks_that_are_no_numbers: r"'first' among them",
    a_block_of_no_numbers: r"encoder\.blocks\.1 holds \d+ numbers, fewer than the 9216 that its width needs",
    a_width_without_blocks_for_it: r"encoder\.blocks\.0 holds",
    a_decoder_without_blocks_for_it: r"decoder\.blocks\.0 holds",
    a_kernel_without_dimensions: r"encoder\.patch_embed\.proj\.weight is of shape \[\]; it must have 4 dimensions",
    positions_without_dimensions: r"encoder\.pos_embed is of shape \[\]",
    a_decoder_without_dimensions: r"decoder\.embed\.weight is of shape \[\]",
    a_projector_without_dimensions: r"projector\.3\.weight is of shape \[\]",
    a_patch_of_no_pixels: r"of shape \[48, 3, 0, 0\]; it must have 4 dimensions, none of 0",
    a_predictor_that_is_too_small: r"predictor holds 8 numbers",
}


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize("change", CLAIMS)
def test_a_file_that_claims_more_than_it_holds(weights, tmp_path, capsys, change):
    change(weights)
    torch.save(weights, tmp_path / "file.pth")
    code, line = imported(tmp_path, capsys)
    assert code == 5
    assert re.search(CLAIMS[change], line), line
    assert main(["eval", "knn", str(tmp_path / "file.pth"), f"--run.dir={tmp_path / 'out'}", "--data.root=x"]) == 5


@pytest.mark.parametrize("change", [blocks_without_number, a_width_without_blocks_for_it, a_kernel_without_dimensions])
def test_a_run_that_claims_more_than_it_holds(tmp_path, monkeypatch, change):
    make_run(tmp_path / "run")
    state = io.newest(tmp_path / "run" / "checkpoints").state
    change(state["model"])
    io.save(tmp_path / "run" / "checkpoints", 8, state, keep=1)
    with pytest.raises(CheckpointError, match=CLAIMS[change]):
        open_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"depth": 100_000}}, "3 blocks, 48 wide"),
        ({"model": {"embed_dim": 65536, "num_heads": 1}}, "encoder: 3 blocks, 48 wide"),
        ({"decoder": {"depth": 2**31 - 1}}, "decoder: 2 blocks, 32 wide"),
        ({"data": {"image_size": (65536, 65536)}}, r"images of \[65536, 65536\]; its weights do not"),
    ],
)
def test_settings_of_a_run_that_are_of_a_larger_model(tmp_path, sections, words):
    """Somebody else's run: what it says is compared, not built."""
    _, config = make_run(tmp_path / "run")
    import dataclasses

    for section, values in sections.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    state = io.newest(tmp_path / "run" / "checkpoints").state | {"config": to_yaml(config)}
    io.save(tmp_path / "run" / "checkpoints", 8, state, keep=1)
    with pytest.raises(CheckpointError, match=words):
        open_run(tmp_path / "run")


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize("arch", ["hf-hub:somebody/model", "local-dir:/etc", "vit_tiny_patch16_224.tag", "a\nb"])
@pytest.mark.parametrize("command", ["import", "masks", "knn"])
def test_a_file_names_an_architecture_of_timm_and_nothing_else(weights, tmp_path, capsys, arch, command):
    """The nearest name is told; nobody is asked for the other one."""
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "w.safetensors", {"arch": arch})
    file, out = str(tmp_path / "w.safetensors"), str(tmp_path / "out")
    line = {
        "import": ["import", file, "--out", out],
        "masks": ["eval", "masks", file, f"--run.dir={out}"],
        "knn": ["eval", "knn", file, f"--run.dir={out}", "--data.root=x"],
    }
    assert main(line[command]) == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert ("a name without a tag" if arch.endswith(".tag") else "no model of timm") in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "about",
    [
        {"timm_arguments": json.dumps({"img_size": [65536, 65536]})},
        {"timm_arguments": json.dumps({"img_size": [4, 32]})},
        {"timm_arguments": json.dumps({"img_size": [32]})},
        {"timm_arguments": json.dumps({"img_size": [-32, 32]})},
        {"mean": json.dumps([0.5] * 100_000), "std": json.dumps([0.5] * 100_000)},
    ],
)
def test_what_a_file_tells_of_its_images_is_held_against_its_weights(weights, tmp_path, capsys, about):
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "w.safetensors", about)
    code, line = imported(tmp_path, capsys, "w.safetensors")
    assert code == 5
    assert "w.safetensors: " in line


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**62) + b"{}",
        b"",
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}},
        {"encoder.patch_embed.proj.weight": {"dtype": "F32", "shape": [0, 3, 2**40, 1], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**50]}},
        {"__metadata__": {"arch": ARCH}},
    ],
)
def test_headers_that_make_no_sense(tmp_path, capsys, header):
    if isinstance(header, dict):
        text = json.dumps(header).encode()
        header = struct.pack("<Q", len(text)) + text
    (tmp_path / "w.safetensors").write_bytes(header)
    code, line = imported(tmp_path, capsys, "w.safetensors")
    assert code in (2, 5)
    assert "w.safetensors" in line


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_nobody_waits_for_a_fifo(tmp_path, capsys, name):
    os.mkfifo(tmp_path / name)
    assert imported(tmp_path, capsys, name) == (
        5,
        f"ccmim: {tmp_path / name}: cannot be read as weights: it is no file",
    )


def test_weights_as_they_are_published_pass(weights, tmp_path):
    """Half precision, a few numbers that are none of a tensor's, and MAE's arguments beside them."""
    halves = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    torch.save({"model": halves, "args": argparse.Namespace(lr=1)}, tmp_path / "file.pth")
    found = read_encoder(str(tmp_path / "file.pth"), ARCH, pretrained_size=(32, 48))
    assert build_encoder(found, (32, 48), 3).blocks[2].attn.qkv.weight.shape == (144, 48)
    assert isinstance(make_run(tmp_path / "run")[0], ccmim.CCMIM)
    assert open_run(tmp_path / "run").model
