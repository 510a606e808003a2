"""What `ccmim bench ladder` writes, and that a rung which changes the losses is found out."""

import functools
import json

import pytest


@pytest.fixture
def ladder(module):
    return module("ladder")


@pytest.mark.slow
def test_results(ladder, small, tmp_path, monkeypatch):
    """Of three rungs, as each takes a process; what each saving does is tested in tests/models/test_savings.py."""
    names = ("naive", "+ fold_input", "+ masked_only")
    few = [rung for rung in ladder.rungs("fp32", "cpu") if rung.name in names]
    monkeypatch.setattr(ladder, "rungs", lambda *_: few)
    out = tmp_path / "ladder"
    assert ladder.main([*small, "--steps=1", f"--out={out}"]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    assert [row["name"] for row in result["rows"]] == [rung.name for rung in few]
    assert len(few) == 3
    naive, *others = result["rows"]
    for row in result["rows"]:
        assert row.keys() == {
            "name",
            "ours",
            "settings",
            "saving",
            "precision",
            "changes_rounding",
            "images_per_second",
            "peak_bytes",
            "gflop_per_image",
            "over_naive",
            "over_before",
            "steps",
            "loss",
            "loss_difference",
            "same_loss",
        }
        assert row["same_loss"]
        assert row["steps"] == 3  # those before the clock count
    assert naive["over_naive"]["median"] == 1
    assert all(row["gflop_per_image"] <= naive["gflop_per_image"] for row in others)
    assert "| naive |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(("device", "other"), [("cpu", {"kernels"}), ("cuda", {"onednn_linear", "kept_memory"})])
def test_rungs_add_up(ladder, module, device, other):
    contenders = ladder.contenders_of(ladder.rungs("bf16", device), "ccmim_vit_base_eq4")
    savings = tuple(name for name in module("naive").SAVINGS if name not in other)
    assert contenders[0].settings == ["--config=ccmim_vit_base_eq4", "--train.compile=off"]
    assert [c.precision for c in contenders[: len(savings) + 2]] == ["fp32"] * (len(savings) + 1) + ["bf16"]
    assert [c.without for c in contenders[: len(savings) + 1]] == [savings[i:] for i in range(len(savings) + 1)]
    assert not contenders[-1].without
    assert contenders[-1].settings[-1] != contenders[0].settings[-1]


@pytest.mark.parametrize(
    ("loss", "rounding", "same"), [(1.0005, False, True), (1.01, False, False), (1.01, True, True), (1.1, True, False)]
)
def test_another_loss_is_marked(ladder, module, loss, rounding, same):
    figures = functools.partial(module("measure").Figures, 1.0, 5, 1e9, 1e12)
    climbed = [ladder.Rung("naive", [], "fp32"), ladder.Rung("+ x", [], "fp32", rounding)]
    rows = ladder.rows_of(climbed, {"naive": [figures([2.0, 1.0])], "+ x": [figures([2.0, loss])]})
    assert rows[0]["same_loss"]
    assert rows[1]["same_loss"] is same


def test_speed_ups_are_over_the_first_and_over_the_one_before(ladder, module):
    figures = functools.partial(
        module("measure").Figures, peak_bytes=5, flops_per_image=1e9, matmul_flops=1e12, losses=[1.0]
    )
    climbed = [ladder.Rung(name, [], "fp32") for name in ("naive", "+ x", "+ y", "+ z")]
    found = {"naive": [figures(1.0)], "+ x": "out of memory", "+ y": [figures(2.0)], "+ z": [figures(6.0)]}
    rows = ladder.rows_of(climbed, found)
    assert rows[1] == {"name": "+ x", "error": "out of memory"}
    assert [row["over_naive"]["median"] for row in (rows[0], *rows[2:])] == [1, 2, 6]
    assert [row["over_before"]["median"] for row in (rows[0], *rows[2:])] == [1, 2, 3]


def test_refused(ladder, module, small, capsys):
    run_main = module("command_line").run_main
    assert run_main(ladder.main, [*small, "--preset=ccmim_vit_bse"]) == 2
    assert run_main(ladder.main, [*small, "--steps=0"]) == 2
    unknown, steps = capsys.readouterr().err.splitlines()
    assert "nearest: ccmim_vit_base" in unknown
    assert "--steps=0: must be at least 1" in steps
