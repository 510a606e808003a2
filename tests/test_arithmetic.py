"""The formulas of docs/performance.md against torch's count and against built models, and its tables against them."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from ccmim_fast.build.model import build_model
from ccmim_fast.config.load import presets

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
arithmetic, growth = (importlib.import_module(name) for name in ("arithmetic", "growth"))

SMALL = arithmetic.Vit("vit_tiny_patch16_224", 192, 12, image=128)


@pytest.mark.parametrize("method", arithmetic.METHODS)
def test_formula_is_what_torch_counts(method):
    """To what it leaves out: the loss of the contrastive half, and vectors."""
    choice = arithmetic.METHODS[method]
    formula = sum(arithmetic.parts(SMALL, *choice).values())
    assert arithmetic.counted(SMALL, *choice) == pytest.approx(formula, rel=2e-4)


@pytest.mark.parametrize("method", arithmetic.METHODS)
def test_parameters_are_the_models(method):
    choice = arithmetic.METHODS[method]
    model = build_model(arithmetic.config_of(SMALL, *choice))
    assert arithmetic.parameters(SMALL, *choice[:2]) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_page_tells_by_how_much_the_presets_costs_are_higher():
    """They count the last blocks of decoder and masked branch in full."""
    stated, higher = {}, {}
    for vit in arithmetic.VITS.values():
        name = vit.arch.split("_")[1]
        for preset, method in ((f"mae_vit_{name}", "MAE-8"), (f"ccmim_vit_{name}", "ccMIM `bank`")):
            counted = sum(arithmetic.parts(vit, *arithmetic.METHODS[method]).values()) / 1e9
            stated[preset] = re.search(r"^# Cost: ([\d.]+) GFLOP", presets()[preset].read_text(), re.M)[1]
            higher[preset] = float(stated[preset]) / counted - 1
    least, most = min(higher, key=higher.get), max(higher, key=higher.get)
    told = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    assert (
        f"are higher, by {higher[least]:.1%} (`{least}`) to {higher[most]:.1%} (`{most}`);".replace("%", " %") in told
    )
    bases = [f"{stated[preset]} (`{preset}`)" for preset in ("mae_vit_base", "ccmim_vit_base")]
    assert f"of ViT-B they are {' and '.join(bases)}." in told


def test_a_bank_costs_a_thousandth_at_most():
    """Beyond scores of the first block, which cost nothing that is counted."""
    for vit in arithmetic.VITS.values():
        bank, first = (sum(arithmetic.parts(vit, source, 2).values()) for source in ("bank", "first"))
        assert 0 < bank / first - 1 < 1e-3


def test_a_third_of_the_teachers_tokens_saves_16_gflop():
    """Of a ViT-B step: two thirds of the masked branch."""
    whole, third = (
        sum(arithmetic.parts(arithmetic.VITS["ViT-B/16"], "bank", 2, tokens).values()) / 1e9 for tokens in (1, 1 / 3)
    )
    assert (round(whole, 1), round(third, 1)) == (57.9, 41.7)


@pytest.mark.parametrize("name", ["arithmetic", "parts"])
def test_the_page_holds_the_table(name):
    assert getattr(arithmetic, f"{name}_table")() in (ROOT / "docs" / "performance.md").read_text()


def test_growth_at_a_steady_rate(tmp_path):
    """Times in proportion to the arithmetic: every rate is 1, time and FLOP per image are equal."""
    points = [point for series in growth.SERIES.values() for point in series]
    found = {point: growth.Timed(point.flops / 1e6, 0.0) for point in points}
    rows = [line.split(" | ") for line in growth.table(found).splitlines()[2:]]
    assert len(rows) == len(points)
    assert all(row[2] == row[3] and row[5] == "1.00 |" for row in rows)
    growth.plot(found, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_growth_steps_train(tmp_path):
    step = growth.step_of(growth.Point("Ti", 64, 2), "fp32", growth.torch.device("cpu"))
    assert step.run(step.prepare()).total.isfinite()
