"""What `ccmim bench bank` writes."""

import json

import pytest


@pytest.fixture
def bank(module, monkeypatch):
    made = module("bank")
    monkeypatch.setattr(made, "IMAGENET", 40)
    monkeypatch.setattr(made, "ROWS", 8)
    monkeypatch.setattr(made, "TIMES", 2)
    monkeypatch.setattr(made, "SIZES", [("host", 40, 4), ("file", 50, 2)])
    return made


@pytest.mark.slow
def test_steps_and_their_parts(bank, small, tmp_path):
    out = tmp_path / "bank"
    assert bank.main([*small, f"--out={out}"]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    assert list(result["steps"]) == ["ccmim-first", "ccmim-bank"]
    assert all(timed["median_us"] > 0 for kind in ("steps", "parts") for timed in result[kind].values())
    page = out.with_suffix(".md").read_text()
    assert "| read maps at patches |" in page
    assert "| all parts |" in page


def test_stores(bank, small, tmp_path):
    out = tmp_path / "stores"
    assert bank.main([*small, "--stores", f"--out={out}"]) == 0
    host, file = json.loads(out.with_suffix(".json").read_text())["stores"]
    assert host.keys() < file.keys()
    assert file["gb"] == pytest.approx(50 * 4 * 2 / 1e9)
    assert "| file | 50 | 2 x 2 |" in out.with_suffix(".md").read_text()
