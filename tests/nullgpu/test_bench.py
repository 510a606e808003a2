"""The benchmarks' GPU side and `ccmim doctor` run to their end on a CUDA device; their figures mean nothing there."""

import json

import pytest
from nullgpu import commands
from nullgpu.null_device import HERE, Result, end_of, run

pytestmark = pytest.mark.slow
SCRIPT = HERE / "run_commands.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def results(folder) -> Result:
    """Benchmarks in processes of their own, which have cuDNN: torch prefers its attention on 9.0, and not on 8.0."""
    lines = {name: ["bench", name, *given, f"--out={folder / name}"] for name, given in commands.BENCHMARKS.items()}
    # A launch takes a millisecond: what is repeated for a while by that clock comes to an end.
    return run(SCRIPT, given=lines | {"doctor": ["doctor"]}, capability=80, timeout=1800, NULLCUDA_LAUNCH_NS="1000000")


@pytest.mark.parametrize("name", commands.BENCHMARKS)
def test_a_benchmark_writes_its_page(results, folder, name):
    assert name in results.told, end_of(results)
    assert results.told[name]["code"] == 0, results.err
    assert "Null GPU sm_80" in (folder / f"{name}.md").read_text()


def test_doctor_names_the_device_and_what_fails_there(results):
    assert "doctor" in results.told, end_of(results)
    found = results.told["doctor"]
    assert (found["code"], found["error"]) == (0, None)
    assert "Null GPU sm_80" in found["out"]
    assert "train.device=auto is cuda, precision=auto bf16, compile=auto step" in found["out"]


# Each rung in this process: in one of its own each would import torch again, and have cuDNN for the naive step.
LADDER = """
import os, sys
import ladder, measure, rounds
from nullgpu.counters import without_cudnn
without_cudnn()
rounds.measure = measure.run
os._exit(ladder.main(sys.argv[1:]))
"""


def test_the_ladder_is_climbed(folder):
    # Fresh memory is zero: so are all losses, which are to be equal.
    zero = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = run(LADDER, *commands.LADDER, f"--out={folder / 'ladder'}", capability=80, **zero)
    assert result.code == 0, end_of(result)
    rows = json.loads((folder / "ladder.json").read_text())["rows"]
    assert [row["name"] for row in rows if "error" in row] == []
    assert (rows[0]["name"], rows[-1]["name"]) == ("naive", "+ compile")


# The ops' own tests come before their times; a device that computes nothing fails them.
OPS = """
import sys
sys.path.append("benchmarks/ops")
import bench
bench.TESTS = (sys.executable, "-c", "")
sys.exit(bench.main(sys.argv[1:]))
"""


def test_the_ops_are_timed(folder):
    size = ("--op", "gather_tokens", "info_nce", "--batch", "4", "--width", "384", "--kernels", "triton", "reference")
    result = run(OPS, *size, "--device=cuda", f"--out={folder / 'ops'}")
    assert result.code == 0, end_of(result)
    assert "gather_tokens" in (folder / "ops.md").read_text()
