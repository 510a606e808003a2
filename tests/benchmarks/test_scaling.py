"""What `ccmim bench scaling` counts and writes."""

import json

import pytest


@pytest.fixture
def scaling(module):
    return module("scaling")


@pytest.mark.slow
def test_ranks_send_what_the_page_says(scaling, small, tmp_path):
    """Also with four micro-batches: gradients are summed once, rows and statistics travel with each."""
    out = tmp_path / "scaling"
    assert scaling.main([*small, "--batch=4", f"--out={out}"]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    sent = {(row["op"], row["accumulate"]): row for row in result["sent"]}
    assert all(row["bytes"] == row["paper_bytes"] > 0 for row in sent.values())
    once, four = (sent["all_reduce", count] for count in (1, 4))
    # One sum of all gradients (they fit into a bucket), one of flags; statistics with each micro-batch.
    assert (once["calls"], four["calls"]) == (1 + 1 + 12, 1 + 1 + 4 * 12)
    assert four["bytes"] < 1.2 * once["bytes"]
    assert [sent["reduce_scatter", count]["calls"] for count in (1, 4)] == [1, 4]
    assert [row["name"] for row in result["rows"]] == list(scaling.variants(4))
    assert all(row["cpu_s"]["median"] > 0 for row in result["rows"])
    assert "| weak: two ranks | 2 x 4 |" in out.with_suffix(".md").read_text()


def test_ratios_tell_what_is_shared_from_what_is_sent(scaling):
    """Half of the machine's speed is lost to sharing, and a fifth of the rest to communication; in each round."""
    rates = {"one process": [10.0, 20.0], "weak: two apart": [10.0, 20.0], "weak: two ranks": [8.0, 16.0]}
    one, apart, ranks = scaling.rows_of(rates, rates)
    assert one["of_ideal"]["median"] == 1
    assert apart["of_ideal"]["rounds"] == [0.5, 0.5]
    assert "of_apart" not in apart
    assert ranks["of_ideal"]["rounds"] == [0.4, 0.4]
    assert ranks["of_apart"]["rounds"] == [0.8, 0.8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch=5"], "--batch=5: must be even and at least 4"),
        (["--steps=0"], "--steps=0: must be at least 1"),
        (["--train.accumulate=2"], "--train.accumulate=2: is 1 here"),
        (["--batch=4", "--score.grid=0"], "score.grid=0"),
    ],
)
def test_mistakes(scaling, arguments, message):
    with pytest.raises(scaling.ConfigError, match=message):
        scaling.parse(arguments)
