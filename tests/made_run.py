"""A run folder as `fit` leaves one, with random weights: what is exported and read again."""

import json
from pathlib import Path

from tiny import tiny_model

from ccmim_fast.checkpoints import io
from ccmim_fast.config.load import to_yaml
from ccmim_fast.config.schema import Config
from ccmim_fast.models.ccmim import CCMIM


def make_run(folder: Path, averaged: bool = False, **sections) -> tuple[CCMIM, Config]:
    """Writes the run; returns its model (float32, evaluating) and settings. `averaged`: weights stand in `ema` only."""
    model, config = tiny_model(**sections)
    model = model.float().eval()
    weights = model.state_dict()
    state = {
        "model": {name: value * 0 for name, value in weights.items()} if averaged else weights,
        "ema": {f"module.{k}": v for k, v in weights.items()} | {"n_averaged": 1} if averaged else None,
        "progress": {"step": 7, "seen": 28, "samples": 4, "images": "x", "shards": 1},
        "config": to_yaml(config),
    }
    io.save(folder / "checkpoints", 7, state, keep=1)
    (folder / "environment.json").write_text(json.dumps({"commit": "abc123"}))
    last = {"kind": "train", "step": 7, "epoch": 7.0, "loss": 0.5, "recons": 0.4, "contrast": 0.3}
    (folder / "metrics.jsonl").write_text(json.dumps(last) + "\n")
    return model, config
