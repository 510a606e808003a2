"""Every kind of training step runs on a GPU, without the host waiting for it, and with its products in 16 bits."""

from functools import cache
from itertools import product
from pathlib import Path

import pytest
from nullgpu.cases import (
    ARCHITECTURES,
    CONTRASTS,
    KERNELS,
    OPTIONS,
    PRECISIONS,
    SOURCES,
    TARGETS,
    parts_of,
    settings_of,
)
from nullgpu.null_device import end_of, run

SCRIPT = Path(__file__).parent / "take_steps.py"
Case = tuple[str, ...]

# In `make test`: each part once, with our kernels where they are, and each architecture.
QUICK: dict[Case, tuple[str, ...]] = {
    ("bf16", "triton", "bank", "nce", "pixels"): parts_of("bank", "nce", "pixels"),
    ("bf16", "reference", "all", "moco", "hog"): parts_of("all", "moco", "hog"),
    ("fp16", "triton", "first", "align", "hog"): parts_of("first", "align", "hog"),
    ("fp32", "reference", "block", "none", "pixels"): parts_of("block", "none", "pixels"),
}
MATRIX: dict[Case, tuple[str, ...]] = {
    (precision, kernels, *parts): parts_of(*parts)
    for *parts, kernels, precision in product(SOURCES, CONTRASTS, TARGETS, KERNELS, PRECISIONS)
    if parts[:2] != ["bank", "none"]  # refused: no pass tells what [CLS] attends to
}
BY_OPTION: dict[Case, tuple[str, ...]] = {
    (precision, kernels, option): OPTIONS[option]
    for option, kernels, precision in product(OPTIONS, KERNELS, ("bf16", "fp32"))
    if (precision, option) != ("fp32", "attention flash")  # has no such kernel
}
BY_ARCHITECTURE: dict[Case, tuple[str, ...]] = {
    (precision, "triton", source, "nce", target): parts_of(source, "nce", target)
    for (source, target), precision in product(zip(SOURCES, TARGETS * 2), PRECISIONS)
}
GROUPS = {"quick": QUICK, "matrix": MATRIX, "options": BY_OPTION, "architecture": BY_ARCHITECTURE}


@cache
def outcomes(group: str, capability: int):
    """The outcomes of a group's cases on an architecture: one process for all."""
    cases = {
        " ".join(case): settings_of(*case[:2], more) for case, more in GROUPS[group].items() if able(case, capability)
    }
    return run(SCRIPT, capability=capability, timeout=1200, given=cases)


def able(case: Case, capability: int) -> bool:
    return capability >= 80 or case[0] != "bf16"


def check(group: str, capability: int, case: Case) -> None:
    """Hold a step against what every step promises."""
    result = outcomes(group, capability)
    step = result.told.get(" ".join(case))
    assert step is not None, end_of(result)
    assert step["error"] is None
    assert step["waits"] == {}
    assert step["to host"] == step["pageable"] == 0
    assert step["refused"] == {}
    precision, kernels = case[:2]
    # Losses are computed in float32, whatever the model is; fp32 means fp32.
    assert step["shares"][precision] > (0.999 if precision == "fp32" else 0.98), step["shares"]
    assert bool(step["kernels"]) == (kernels == "triton"), step["kernels"]


def ids(cases) -> list[str]:
    return [" ".join(map(str, case)) if isinstance(case, tuple) else str(case) for case in cases]


@pytest.mark.parametrize("case", QUICK, ids=ids(QUICK))
def test_a_step_of_each_part(case):
    check("quick", 90, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX, ids=ids(MATRIX))
def test_every_source_contrast_and_target(case):
    check("matrix", 90, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", BY_OPTION, ids=ids(BY_OPTION))
def test_every_option(case):
    check("options", 90, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "case"),
    [(capability, case) for capability, case in product(ARCHITECTURES, BY_ARCHITECTURE) if able(case, capability)],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else f"sm_{value}",
)
def test_every_architecture(capability, case):
    check("architecture", capability, case)
