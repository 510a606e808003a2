"""The paper's preset, unchanged but for batch and length, trains the real ViT-B on a folder of JPEG files."""

import json

import pytest
import torch
from PIL import Image

from ccmim_fast.cli import main


def gflop_by_hand(source):
    """The step's matrix products, counted from the shapes: ViT-B/16, 196 patches, 49 visible, scores from the
    bank or from all blocks.

    A whole block costs 24 width^2 per token (6 for q, k, v, 2 for the projection, 16 for the MLP) and 4 T^2 width for
    attention. The backward pass costs twice the forward pass, of attention 2.5 times, as its scores are made again.
    """
    E, D, T, V, M, blocks = 768, 512, 197, 50, 148, 12
    embedding = 2 * E * E * (196 + 49)  # forward, and the gradient of the weight, from the visible patches alone
    if source == "bank":  # rows of [CLS] in both passes; Eq. 4 at the first block by one vector
        score = blocks * 2 * (V + M) * E + 2 * 196 * E
    else:
        score = (blocks - 1) * (24 * E**2 * T + 4 * T**2 * E) + 2 * E**2 * (T + 1) + blocks * 2 * T * E
    visible = blocks * (3 * 24 * E**2 * V + 3.5 * 4 * V**2 * E)
    masked = (blocks - 1) * (24 * E**2 * M + 4 * M**2 * E) + 4 * E**2 * M + 20 * E**2 + 4 * M * E
    heads = 4 * (2 * E**2 + 2 * E * 256)
    whole_decoder_block = 3 * 24 * D**2 * T + 3.5 * 4 * T**2 * D
    last_decoder_block = 3 * (4 * D**2 * T + 20 * D**2 * 147) + 3.5 * 4 * 147 * T * D
    ends = 3 * (2 * V * E * D + 2 * 147 * D * E)
    return (embedding + score + visible + masked + heads + whole_decoder_block + last_decoder_block + ends) / 1e9


@pytest.mark.slow
@pytest.mark.parametrize(("loader", "source"), [("torch", "bank"), ("dali", "all")])
def test_paper_preset_takes_steps(tmp_path, loader, source):
    root = tmp_path / "images"
    for i in range(8):
        folder = root / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (15, 20, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((320, 240)).save(folder / f"{i}.jpg")
    settings = {
        "config": "configs/ccmim_vit_base.yaml",
        "data.root": root,
        "data.loader": loader,
        **({} if source == "bank" else {"score.source": source}),  # the bank is the preset's own
        "run.dir": tmp_path / "run",
        "run.log_every": 1,
        "train.batch_size": 4,
        "train.max_steps": 2,
        "train.device": "cpu",
        "train.attention": "sdpa",
        "train.feature_images": 2,
    }
    assert main(["pretrain", *(f"--{key}={value}" for key, value in settings.items())]) == 0
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    records = [record for record in lines if record["kind"] == "train"]
    assert [r["step"] for r in records] == [1, 2]
    assert all(r["recons"] is not None and r["contrast"] is not None for r in records)
    assert records[0]["gflop_per_image"] == pytest.approx(gflop_by_hand(source), rel=1e-3)
