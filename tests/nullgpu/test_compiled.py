"""A compiled step is compiled once, in the warm-up, for the device, and runs fewer kernels than the eager one."""

from functools import cache
from itertools import product
from pathlib import Path

import pytest
from nullgpu.cases import CONTRASTS, KERNELS, SOURCES, parts_of, settings_of
from nullgpu.null_device import end_of, run

SCRIPT = Path(__file__).parent / "compile_steps.py"
Case = tuple[str, ...]

QUICK: dict[Case, tuple[str, ...]] = {
    ("bf16", "triton", "bank", "nce"): parts_of("bank", "nce", "pixels"),
    ("bf16", "reference", "first", "none"): parts_of("first", "none", "hog"),
}
# Each source with each contrast, each of them with both kinds of kernels.
MATRIX: dict[Case, tuple[str, ...]] = {
    ("bf16", KERNELS[(SOURCES.index(source) + CONTRASTS.index(contrast)) % 2], source, contrast): parts_of(
        source, contrast, "pixels"
    )
    for source, contrast in product(SOURCES, CONTRASTS)
    if (source, contrast) != ("bank", "none")
}
GROUPS = {"quick": QUICK, "slow": MATRIX}
# By inductor, each a minute of a core: capability, precision, kernels, what is compiled.
INDUCTOR = [
    (90, "bf16", "triton", "step"),
    (90, "bf16", "triton", "blocks"),
    (75, "fp16", "triton", "step"),
    (80, "bf16", "triton", "blocks"),
]


@cache
def traced(group: str):
    """The outcomes of a group's cases, whose graphs run as they are traced: one process for all."""
    cases = {" ".join(case): settings_of(*case[:2], more) for case, more in GROUPS[group].items()}
    return run(SCRIPT, "traced", timeout=1200, given=cases)


@cache
def compiled(capability: int, precision: str, kernels: str, what: str, *more: str):
    """The outcome of a step that inductor compiles, or that is `off`."""
    settings = (*settings_of(precision, kernels, ("--decoder.depth=1", *more)), f"--train.compile={what}")
    result = run(SCRIPT, capability=capability, timeout=1200, given={"step": settings})
    assert "step" in result.told, end_of(result)
    # What a failed warm-up says.
    assert "train.compile failed" not in result.err, end_of(result)
    return result.told["step"]


def check_traced(group: str, case: Case) -> None:
    result = traced(group)
    step = result.told.get(" ".join(case))
    assert step is not None, end_of(result)
    assert step["error"] is None
    assert step["compiled"]
    assert step["breaks"] == {}
    assert step["graphs"] == [1, 1, 1]


@pytest.mark.parametrize("case", QUICK, ids=" ".join)
def test_the_first_real_step_compiles_nothing(case):
    check_traced("quick", case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX, ids=" ".join)
def test_no_first_real_step_compiles_anything(case):
    check_traced("slow", case)


@pytest.mark.slow
@pytest.mark.parametrize("case", INDUCTOR, ids=lambda case: " ".join(map(str, case)))
def test_inductor_compiles_for_the_device_once(case):
    capability, precision, kernels, what = case
    step = compiled(*case)
    assert step["error"] is None
    assert step["compiled"]
    assert step["breaks"] == {}
    assert step["graphs"] == [step["graphs"][0]] * 3
    if what == "step":
        assert step["graphs"][0] == 1
    assert step["fused"] > 0
    assert step["waits"] == {}
    assert step["to host"] == step["pageable"] == 0
    assert step["shares"][precision] > 0.98
    assert bool(step["kernels"]) == (kernels == "triton")
    eager = compiled(capability, precision, kernels, "off")
    assert step["launches"] < eager["launches"]


@pytest.mark.slow
def test_a_compiled_step_is_captured():
    """A graph cannot be captured while something is compiled."""
    step = compiled(90, "bf16", "triton", "step", "--train.cuda_graph=true")
    assert step["error"] is None
    assert step["launches"] < 10
