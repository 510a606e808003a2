"""A rank of 8 and of 512 GPUs takes its steps without a wait of the host, and sends what benchmarks/cluster.py says."""

from functools import cache
from pathlib import Path

import pytest
from cluster import VITS, Traffic, Vit, divided_traffic, traffic
from nullgpu.null_device import end_of, run

SCRIPT = Path(__file__).parent / "take_rank_steps.py"
IMAGES, CELLS = 4, 16  # images of a rank's micro-batch; cells of a side of a map
TINY = Vit("vit_tiny_patch16_224", 192, 12)
DDP_LOGS = list(range(2, 12))  # in these steps the logger of torch's DDP waits for the device, and in the 101st
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
    "FSDP, 8, micro-batches": case(8, 3, TINY, FSDP, accumulate=4),
}
LARGE = {
    "DDP, 512, ViT-B": case(512, 12, VITS["ViT-B/16"]),
    "FSDP, 8, ViT-H": case(8, 3, VITS["ViT-H/14"], FSDP),
    "FSDP, 512, ViT-H": case(512, 3, VITS["ViT-H/14"], FSDP),
}
LONG = {"DDP, 8, 102 steps": case(8, 102, TINY)}


@cache
def outcomes(group: str):
    """The outcomes of a group of cases: one process for all."""
    cases = {"quick": QUICK, "large": LARGE, "long": LONG}[group]
    return run(SCRIPT, memory_gb=140, timeout=1200, given=cases)


def outcome(group: str, name: str) -> dict:
    result = outcomes(group)
    assert name in result.told, end_of(result)
    return result.told[name]


def on_paper(name: str, found: dict) -> list[Traffic]:
    """Return what benchmarks/cluster.py says of a case."""
    gpus = int(name.split(",")[1])
    vit = next((vit for model, vit in VITS.items() if model.startswith(name[-5:])), TINY)
    how = {"accumulate": 4 if "micro" in name else 1, "cells": CELLS}
    if name.startswith("FSDP"):
        return divided_traffic(vit, IMAGES, gpus, **how)
    return traffic(found["parameters"], vit.width, IMAGES, gpus, **how)


def check(group: str, name: str) -> None:
    """Hold the bytes of each collective against the formula, and the calls that do not depend on DDP's buckets."""
    found = outcome(group, name)
    paper = on_paper(name, found)
    sizes = {op: sum(one.size for one in paper if one.op == op) for op in {one.op for one in paper}}
    assert {op: size for op, (_, size) in found["sent"].items()} == sizes
    for op in sizes:
        calls = [one.calls for one in paper if one.op == op]
        assert None in calls or found["sent"][op][0] == sum(calls), op
    assert found["waits in"] == (DDP_LOGS if name.startswith("DDP") else [])


@pytest.mark.parametrize("name", QUICK)
def test_a_rank_sends_what_the_formula_says_and_does_not_wait(name):
    check("quick", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_rank_of_a_large_model(name):
    check("large", name)


@pytest.mark.slow
def test_ddp_waits_once_in_100_steps():
    assert outcome("long", "DDP, 8, 102 steps")["waits in"] == [*DDP_LOGS, 101]
