"""A run that stops within an epoch and goes on with more or fewer ranks is the run that never stopped (fault 15)."""

import json
from collections import defaultdict

import pytest
from ranks_launcher import FAULTY, run_ranks
from small_run import run_settings

EPOCHS, SAMPLES, STEPS = 3, 40, 8  # of 16 samples: each epoch ends within a step, the 3rd, the 5th and the 8th
LEGS = [(1, 2), (2, 6), (1, 8)]  # ranks, and the step until which they go: stops within the first and the third epoch
ROUNDING = 2e-6  # sums over 16 images in another order; 2e-7 of a loss was seen (AMD EPYC)


def leg(folder, ranks, *settings):
    """Run so many ranks, each of which writes down the ids of its steps."""
    more = [f"--data.samples={SAMPLES}", f"--train.epochs={EPOCHS}", *settings]
    run_ranks(ranks, FAULTY, "ids", "0", "all", *run_settings(folder), *more, IDS=str(folder))


def ids_of_steps(folder):
    """All ranks' together, sorted, as a step has them in any order; of each step once."""
    found = defaultdict(list)
    for path in folder.glob("*.jsonl"):
        for step, ids in map(json.loads, path.read_text().splitlines()):
            found[step] += ids
    return {step: sorted(ids) for step, ids in found.items()}


def recons(folder):
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [record["recons"] for record in records if record["kind"] == "train"]


@pytest.mark.slow
def test_one_rank_then_two_then_one(tmp_path):
    whole, legs = tmp_path / "whole", tmp_path / "legs"
    for folder in (whole, legs):
        folder.mkdir()
    leg(whole, 1, "--score.source=first")
    for ranks, until in LEGS:
        leg(legs, ranks, "--score.source=first", f"--train.max_steps={until}", "--run.resume=auto")
    one, other = ids_of_steps(whole), ids_of_steps(legs)
    assert list(one) == list(range(1, STEPS + 1))
    assert other == one
    # Each epoch has all samples, and each once.
    stream = [sample for step in sorted(other) for sample in other[step]]
    assert len(stream) == 16 * STEPS
    assert {stream.count(sample) for sample in range(SAMPLES)} <= {EPOCHS, EPOCHS + 1}
    assert len(recons(legs)) == STEPS
    assert recons(legs) == pytest.approx(recons(whole), rel=ROUNDING)
