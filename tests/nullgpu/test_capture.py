"""The whole step can be captured as a CUDA graph, and a replay reads nothing on the host that was written over."""

from functools import cache
from itertools import product
from pathlib import Path

import pytest
from nullgpu.cases import KERNELS, OPTIONS, PRECISIONS, SOURCES, settings_of
from nullgpu.null_device import end_of, run

SCRIPT = Path(__file__).parent / "capture_steps.py"
Case = tuple[str, ...]

ALL_PARTS = ("--optim.clip_grad=1", "--optim.ema_decay=0.9", "--train.accumulate=2", "--train.batch_size=8")
EXTRAS = {"alone": (), "clip, average, accumulate": ALL_PARTS}
QUICK: dict[Case, tuple[str, ...]] = {
    ("bf16", "triton", "bank", "alone"): ("--score.source=bank",),
    ("fp16", "reference", "first", "clip, average, accumulate"): ("--score.source=first", *ALL_PARTS),
}
MATRIX: dict[Case, tuple[str, ...]] = {
    (precision, kernels, source, extra): (f"--score.source={source}", f"--score.block={int(source == 'block')}", *more)
    for source, (extra, more), kernels, precision in product(SOURCES, EXTRAS.items(), KERNELS, PRECISIONS)
}
BY_OPTION: dict[Case, tuple[str, ...]] = {("bf16", "triton", option): more for option, more in OPTIONS.items()}
GROUPS = {"quick": QUICK, "slow": MATRIX | BY_OPTION}


@cache
def outcomes(group: str):
    """The outcomes of a group's cases: one process for all."""
    cases = {" ".join(case): settings_of(*case[:2], more) for case, more in GROUPS[group].items()}
    return run(SCRIPT, timeout=1200, given=cases)


def check(group: str, case: Case) -> None:
    """Hold a captured step against what a graph promises."""
    result = outcomes(group)
    step = result.told.get(" ".join(case))
    assert step is not None, end_of(result)
    assert step["error"] is None
    assert step["refused"] == {}
    assert step["nodes"] > 100
    assert step["replays"] == 1
    assert step["changed"] == 0, "the graph reads host memory that torch has given to somebody else"
    assert step["waits"] == {}
    assert step["to host"] == 0
    # The batch is copied to where the graph reads it, and the bank's maps are read and written: no step beside it.
    assert step["outside"] < 10


@pytest.mark.parametrize("case", QUICK, ids=" ".join)
def test_a_step_is_captured(case):
    check("quick", case)


@pytest.mark.slow
@pytest.mark.parametrize("case", GROUPS["slow"], ids=" ".join)
def test_every_step_is_captured(case):
    check("slow", case)
