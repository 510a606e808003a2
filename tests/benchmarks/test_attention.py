"""The attention benchmark on the smallest shape."""

import json


def test_results(module, tmp_path, capsys):
    out = tmp_path / "attention"
    arguments = ["--device=cpu", "--batch=1", "--rounds=1", "--shapes=1", f"--out={out}"]
    assert module("attention").main(arguments) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [(row["tokens"], row["dtype"]) for row in rows] == [(50, "fp32"), (50, "bf16")]
    for row in rows:
        assert set(row["both_ms"]) == set(row["forward_ms"]) == {"sdpa", "plain"}
        assert all(ms > 0 for ms in (*row["both_ms"].values(), *row["forward_ms"].values()))
        assert row["best"] == min(row["both_ms"], key=row["both_ms"].get)
    assert "| 50 x 12 x 64 | fp32 |" in capsys.readouterr().out


def test_a_backend_that_fails_is_left_out(module, monkeypatch):
    attention = module("attention")

    def fails(q, k, v, backend):
        if backend == "sdpa":
            raise RuntimeError("no kernel\nfound")
        return q

    monkeypatch.setattr(attention, "attention", fails)
    options = attention.parse(["--device=cpu", "--batch=1", "--rounds=1"])
    row = attention.row((4, 1, 8), "fp32", options)
    assert row["missing"] == {"sdpa": "no kernel"}
    assert set(row["both_ms"]) == {"plain"}
    assert "| - |" in attention.body([row, {**row, "both_ms": {"sdpa": 1.0}, "forward_ms": {"sdpa": 1.0}}])
