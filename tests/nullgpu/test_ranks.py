"""A rank of 8 and of 512 GPUs takes its steps without a wait of the host, and sends what benchmarks/cluster.py says."""

from functools import cache
from pathlib import Path

import pytest
from cluster import VITS, Vit, traffic
from nullgpu.null_device import end_of, run

SCRIPT = Path(__file__).parent / "take_rank_steps.py"
IMAGES, CELLS = 4, 16  # images of a rank's micro-batch; cells of a side of a map
TINY = Vit("vit_tiny_patch16_224", 192, 12)
DDP_LOGS = list(
    range(2, 12)
)  # steps in which the logger of torch's DDP waits for the device, and each 100th after them
EAGER = ("--train.device=cuda", "--train.compile=off", "--train.kernels=reference", f"--score.grid={CELLS}")


def case(gpus: int, steps: int, vit: Vit, *settings: str, accumulate: int = 1) -> list:
    batch = (f"--train.accumulate={accumulate}", f"--train.batch_size={gpus * accumulate * IMAGES}")
    return [gpus, steps, [*EAGER, f"--model.arch={vit.arch}", *batch, *settings]]


FSDP = "--train.parallel=fsdp"
QUICK = {
    "DDP, 8": case(8, 12, TINY),
    "DDP, 512": case(512, 12, TINY),
    "DDP, 8, micro-batches": case(8, 12, TINY, accumulate=4),
    "FSDP, 8": case(8, 3, TINY, FSDP),
    "FSDP, 512": case(512, 3, TINY, FSDP),
}
LARGE = {
    "DDP, 512, ViT-B": case(512, 12, VITS["ViT-B/16"]),
    "DDP, 8, 101 steps": case(8, 102, TINY, "--model.depth=1"),
    "FSDP, 8, ViT-H": case(8, 3, VITS["ViT-H/14"], FSDP),
    "FSDP, 512, ViT-H": case(512, 3, VITS["ViT-H/14"], FSDP),
}
DDP_CASES = {name: (TINY, int(name.split(",")[1]), 4 if "micro" in name else 1) for name in QUICK if "DDP" in name}


@cache
def outcomes(quick: bool):
    """The outcomes of the quick or of the large cases: one process for all."""
    return run(SCRIPT, memory_gb=140, timeout=1200, given=QUICK if quick else LARGE)


def outcome(name: str) -> dict:
    result = outcomes(name in QUICK)
    assert name in result.told, end_of(result)
    return result.told[name]


def check_ddp(name: str, vit: Vit, gpus: int, accumulate: int) -> None:
    """Hold the bytes of each collective against the formula, and the calls that do not depend on DDP's buckets."""
    found = outcome(name)
    paper = traffic(found["parameters"], vit.width, IMAGES, gpus, accumulate=accumulate, cells=CELLS)
    expected = {op: sum(one.size for one in paper if one.op == op) for op in {one.op for one in paper}}
    assert {op: size for op, (_, size) in found["sent"].items()} == expected
    for op in ("all_gather", "reduce_scatter"):
        assert found["sent"][op][0] == sum(one.calls for one in paper if one.op == op)


@pytest.mark.parametrize("name", DDP_CASES)
def test_ddp_sends_what_the_formula_says(name):
    check_ddp(name, *DDP_CASES[name])


@pytest.mark.slow
def test_ddp_sends_what_the_formula_says_of_vit_b():
    check_ddp("DDP, 512, ViT-B", VITS["ViT-B/16"], 512, 1)


@pytest.mark.parametrize("name", DDP_CASES)
def test_no_host_waits_after_the_first_steps_of_ddp(name):
    assert outcome(name)["waits in"] == DDP_LOGS


@pytest.mark.slow
def test_ddp_waits_once_in_100_steps():
    assert outcome("DDP, 8, 101 steps")["waits in"] == [*DDP_LOGS, 101]


@pytest.mark.parametrize("name", ["FSDP, 8", "FSDP, 512"])
def test_no_host_waits_with_fsdp(name):
    assert outcome(name)["waits in"] == []
