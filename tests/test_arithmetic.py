"""The formulas of docs/performance.md against torch's count and against built models, and its tables against them."""

import importlib
import sys
from pathlib import Path

import pytest

from ccmim_fast.build.model import build_model

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


@pytest.mark.parametrize(
    ("method", "base", "large"),
    [
        ("MAE-8", 58.5, 124.2),
        ("MAE-2", 34.7, 100.5),
        ("ccMIM `first`", 60.9, 192.5),
        ("ccMIM `bank`", 60.9, 192.5),
        ("ccMIM `all`", 93.1, 310.6),
    ],
)
def test_the_presets_state_the_cost_a_little_higher(method, base, large):
    """They count the last blocks of decoder and masked branch in full."""
    for name, cost in (("ViT-B/16", base), ("ViT-L/16", large)):
        counted = sum(arithmetic.parts(arithmetic.VITS[name], *arithmetic.METHODS[method]).values()) / 1e9
        assert 0.94 * cost < counted < cost


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
