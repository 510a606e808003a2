"""Looks: what a run records of its features, when, and that nothing else of the run changes."""

import dataclasses
import json
import shutil

import pytest
import torch
from tiny import tiny_config

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.run import open_run
from ccmim_fast.data.build import build_source
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.stream.torch_loader import evaluation_batches
from ccmim_fast.engine import look as module
from ccmim_fast.engine.look import SETS, Look, measures
from ccmim_fast.engine.loop import Loop
from ccmim_fast.engine.pretraining import fit
from ccmim_fast.engine.representation import alignment, alpha_req, lidar, rankme, uniformity
from ccmim_fast.errors import DataError, StoppedError
from ccmim_fast.models.tokens import encode, prefix_tokens, tokens_of
from ccmim_fast.models.views import Views
from ccmim_kernels import gather_tokens
from ccmim_kernels.philox import keyed_uniform
from ccmim_kernels.sample_partition import partition_from_mask

MEASURES = {"rankme", "alpha_req", "uniformity", "lidar"}
OF_BOTH = MEASURES | {f"{name}_cls" for name in MEASURES}


@pytest.fixture(autouse=True)
def no_counting(monkeypatch):
    """The FLOP counter takes a pass of its own before the run."""
    monkeypatch.setattr("ccmim_fast.engine.pretraining.count_flops", lambda step: {})


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def config_for(shapes):
    """config_for(folder, **sections): a run of four epochs of two steps, of 16 images, 12 of which are looked at."""

    def config(folder, **sections):
        train = {"epochs": 4, "batch_size": 8, "device": "cpu", "precision": "fp32", "feature_images": 12}
        made = {
            "run": {"dir": str(folder), "log_every": 1, "save_every": 1, "keep": 9, "tensorboard": False},
            "data": {"source": "shapes", "samples": 16, "root": str(shapes), "loader": "torch"},
            "train": {**train, **sections.pop("train", {})},
        }
        return tiny_config(**made, **sections)

    return config


def changed(config, section, **fields):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


def records(folder, kind="features"):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def random_division(ids_B, number, keep):
    """Of 24 patches those with the largest keys are masked; the keys are of seed 0, of the number as an epoch."""
    keys_BL = keyed_uniform(0, torch.full_like(ids_B, number), ids_B, 24).float()
    masked_BM = keys_BL.argsort(dim=1, descending=True, stable=True)[:, : 24 - keep]
    return partition_from_mask(torch.zeros_like(keys_BL, dtype=torch.bool).scatter_(1, masked_BM, True), keep)


def test_the_record_is_of_the_checkpoint_s_features(tmp_path, config_for):
    """Of whole images as features are exported, of sets as the specification draws them, of hV and hM as in a step."""
    config = config_for(tmp_path)
    fit(config)
    first, *_, last = records(tmp_path)
    assert [record["step"] for record in records(tmp_path)] == [0, 2, 4, 6, 8]
    assert last.keys() == {"kind", "step", "epoch", "images", *OF_BOTH, "alignment"}
    assert (first["epoch"], last["epoch"], last["images"]) == (0.0, 4.0, 12)
    model = open_run(str(tmp_path)).model.eval()
    source = build_source(config.data, config.seed)
    [all_of_them] = evaluation_batches(source, config.data.image_size, 16, torch.device("cpu"))
    chosen = torch.arange(12) * 16 // 12
    images_BHWC = all_of_them.images_BHWC[chosen]
    drawn = [random_division(chosen, number, model.keep) for number in range(SETS)]
    with torch.no_grad():
        whole_BTD = tokens_of(model.encoder, model.mean_C, model.std_C)(images_BHWC)
        embedded_BLD = model.embed(images_BHWC)
        sets = [
            encode(model.encoder, gather_tokens(embedded_BLD, one.ids_visible_BK, prefix_tokens(model.encoder)))[0]
            for one in drawn
        ]
        output = model(images_BHWC, chosen, 0, partition=drawn[0])
    for suffix, pool in (("", lambda x: x[:, 1:].mean(1)), ("_cls", lambda x: x[:, 0])):
        for measure in (rankme, alpha_req, uniformity):
            name = f"{measure.__name__}{suffix}"
            assert last[name] == pytest.approx(measure(pool(whole_BTD)).item(), rel=1e-4), name
            assert last[name] != first[name]
        expected = lidar(torch.stack([pool(one) for one in sets], dim=1)).item()
        assert last[f"lidar{suffix}"] == pytest.approx(expected, rel=1e-4)
    assert last["alignment"] == pytest.approx(alignment(output.visible_BE, output.masked_BE).item(), rel=1e-4)


@pytest.mark.parametrize("bank", [True, False])
def test_a_run_with_looks_is_the_run_without(tmp_path, config_for, bank):
    """Weights, averages, moments, BatchNorm's statistics, the bank's maps and the figures of each step, bit for bit."""
    states, figures = [], []
    for name, images in (("with", 12), ("without", 0)):
        score = {"source": "bank" if bank else "all"}
        more = {"model": {"drop_path": 0.2}, "optim": {"ema_decay": 0.9}, "score": score}
        fit(config_for(tmp_path / name, train={"feature_images": images}, **more))
        states.append(io.newest(tmp_path / name / "checkpoints").state)
        figures.append([(r["step"], r["loss"], r["grad_norm"]) for r in records(tmp_path / name, "train")])
    assert len(records(tmp_path / "with")) == 5
    assert not records(tmp_path / "without")
    assert figures[0] == figures[1]
    for part in ("model", "ema", "optimizer", "maps"):
        assert _same(states[0][part], states[1][part]), part


def _same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_features_that_are_not_finite_have_no_figures():
    """Each is null in the record; so are those of a single image that have no meaning."""
    pooled, pair = torch.randn(20, 3, 2, 8), torch.randn(20, 2, 4)
    pooled[3, 1, 0, 2] = torch.inf
    found = measures(Views(pooled, pair))
    assert found.keys() == OF_BOTH | {"alignment"}
    assert all(value != value for value in found.values())
    alone = measures(Views(pooled[:1], None))
    assert alone["rankme"] == pytest.approx(1)
    assert {name for name, value in alone.items() if value != value} == OF_BOTH - {"rankme", "rankme_cls"}


def test_mae_has_no_alignment(tmp_path, config_for):
    more = {"mask": {"strategy": "random"}, "contrast": {"loss": "none"}}
    fit(config_for(tmp_path, train={"max_steps": 1}, **more))
    for record in records(tmp_path):
        assert record.keys() == {"kind", "step", "epoch", "images", *OF_BOTH}
        assert all(record[name] is not None for name in OF_BOTH)


def test_a_resumed_run_has_each_record_once(tmp_path, config_for):
    """Stopped within an epoch and at the end of one; and gone back to a checkpoint before the last."""
    whole, parts = config_for(tmp_path / "whole"), config_for(tmp_path / "parts")
    fit(whole)
    expected = records(tmp_path / "whole")
    for stop in (1, 4):
        fit(changed(changed(parts, "train", max_steps=stop), "run", resume="auto"))
    fit(changed(parts, "run", resume="auto"))
    # The first leg ended within an epoch, after a look of its own.
    assert [record for record in records(tmp_path / "parts") if record["step"] != 1] == expected
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_00000008")
    fit(changed(parts, "run", resume="auto"))
    assert [record for record in records(tmp_path / "parts") if record["step"] != 1] == expected


def test_a_stop_at_the_end_of_an_epoch_leaves_its_record(tmp_path, config_for, monkeypatch):
    """The checkpoint is made where the signal is seen, so no look could follow it."""
    check = Loop._check

    def stopped(loop, *step):
        loop.signals.name = "SIGTERM" if loop.step == 4 else ""
        check(loop, *step)

    monkeypatch.setattr(Loop, "_check", stopped)
    with pytest.raises(StoppedError):
        fit(config_for(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr("ccmim_fast.engine.pretraining.count_flops", lambda step: {})
    assert [record["step"] for record in records(tmp_path)] == [0, 2, 4]
    fit(changed(config_for(tmp_path), "run", resume="auto"))
    assert [record["step"] for record in records(tmp_path)] == [0, 2, 4, 6, 8]


def test_looks_cost_a_hundredth_of_an_epoch_or_come_with_checkpoints(tmp_path, config_for):
    """Three steps of each image, at most."""
    fit(changed(config_for(tmp_path), "run", save_every=3))
    assert [record["step"] for record in records(tmp_path)] == [0, 6, 8]
    look = object.__new__(Look)
    look._plan, look.images = type("Plan", (), {"samples": 3600})(), 12
    assert [look.is_due(epoch, saved) for epoch, saved in ((0, False), (1, False), (2, True))] == [True, True, True]
    look._plan.samples = 3599
    assert [look.is_due(epoch, saved) for epoch, saved in ((0, False), (1, False), (2, True))] == [True, False, True]


def test_an_image_that_fails_is_replaced(tmp_path, config_for, monkeypatch):
    """By the one that training shows; what is told of bad images is of training alone."""
    seen, take = [], module.take_views

    def taken(model, images_BHWC, ids_B, *rest, **options):
        seen.extend(ids_B.tolist())
        return take(model, images_BHWC, ids_B, *rest, **options)

    def decode(source, index):
        if index == 4:
            raise DataError("4 is gone")
        return original(source, index)

    original = ShapesSource.decode
    monkeypatch.setattr(module, "take_views", taken)
    monkeypatch.setattr(ShapesSource, "decode", decode)
    fit(changed(config_for(tmp_path, train={"max_steps": 1}), "data", max_bad=0.5))
    assert len(seen) == 24
    assert 4 not in seen
    assert seen[:12] == seen[12:]
    assert len(records(tmp_path)) == 2
