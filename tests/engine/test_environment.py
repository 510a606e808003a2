"""A short pretraining with what is installed; `make test ENV=...` runs it with other releases of torch and DALI."""

import dataclasses
import importlib
import importlib.util
import json
import math

import pytest
import torch
from tiny import tiny_config

from ccmim_fast.data.stream import dali_loader
from ccmim_fast.engine.build import build_step
from ccmim_fast.engine.dry_run import synthetic_batch
from ccmim_fast.engine.pretraining import fit
from ccmim_fast.ranks.session import Session

STEPS = 20


def losses_of(run, loader):
    """The losses of a tiny ccMIM's first steps on made images, as logged: one dict a step."""
    config = tiny_config(
        run={"dir": str(run), "log_every": 1, "save_every": 10, "tensorboard": False},
        data={"source": "shapes", "samples": 20, "root": str(run.parent / "cache"), "loader": loader},
        train={"epochs": STEPS // 2, "batch_size": 10, "device": "cpu", "precision": "fp32"},
        optim={"base_lr": 0.1, "warmup_epochs": 1.0},
    )
    fit(dataclasses.replace(config, seed=0))
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_short_pretraining_learns(tmp_path, loader):
    if loader == "dali" and not dali_loader.is_installed():
        pytest.skip("DALI is not installed")
    records = losses_of(tmp_path / "run", loader)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert all(math.isfinite(r[name]) for r in records for name in ("loss", "recons", "contrast"))
    for name in ("loss", "recons"):
        values = [r[name] for r in records]
        assert sum(values[-4:]) < 0.95 * sum(values[:4]), name


@pytest.mark.parametrize("name", ["xformers.ops", "nvidia.dali.fn", "triton.language"])
def test_what_is_installed_can_be_imported(name):
    """A wheel made for another torch or CUDA fails at its import."""
    if importlib.util.find_spec(name.split(".")[0]) is None or (
        name.startswith("nvidia") and not dali_loader.is_installed()
    ):
        pytest.skip(f"{name} is not installed")
    importlib.import_module(name)


@pytest.mark.parametrize("score", [{"source": "all"}, {"source": "block", "block": 2}, {"source": "bank"}])
def test_every_weight_has_a_gradient_in_half_precision(score):
    """Of weights that a pass without gradients has used before; torch 2.7.1's autocast would keep their cast copies."""
    config = tiny_config(score=score, train={"precision": "bf16", "device": "cpu"})
    step = build_step(config, Session(0, 1, torch.device("cpu")))
    batch = synthetic_batch(step, 4)
    losses, *_ = step.losses(batch.images_BHWC, batch.ids_B, batch.epochs_B, batch.boxes_B4, batch.maps_BGG)
    losses.total.backward()
    assert [name for name, p in step.model.named_parameters() if p.requires_grad and p.grad is None] == []
