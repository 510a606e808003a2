"""Every kernel compiles, without spilling, in every configuration that its launcher can choose."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ccmim_kernels.triton_impl.launch import recorded

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks" / "ops"))
registry = importlib.import_module("registry")  # benchmarks are scripts, no package


def kernel_names(op: str) -> set[str]:
    """Find the functions of the op's file that can be launched; a profile knows them by this pattern."""
    source = (ROOT / "kernels" / "ccmim_kernels" / "triton_impl" / f"{op}.py").read_text()
    return set(re.findall(r"^def (ccmim_\w+_kernel)\(", source, re.M))


@pytest.mark.slow
def test_compiles_without_spills():
    """For the oldest GPU generation and Hopper; the script alone takes minutes for all nine."""
    # A process of its own: in the interpreter kernels are Python functions, which cannot be compiled.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, str(ROOT / "benchmarks" / "ops" / "ahead_of_time.py"), "--arch", "61", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for op in registry.NAMES:
        assert all(f"| {name} |" in done.stdout for name in kernel_names(op))


def configurations(launches) -> set[tuple]:
    return {(launch.kernel.__name__, launch.constants, launch.warps, launch.fp_fusion) for launch in launches}


@pytest.mark.parametrize("width", [768, 100, 3])
@pytest.mark.parametrize("grid", [(2, 2), (14, 14), (20, 20), (32, 40)])
@pytest.mark.parametrize("op", registry.NAMES)
def test_what_is_launched_was_compiled(op, grid, width, device):
    """Public calls of many sizes choose no configuration that was not compiled ahead of time."""
    size = registry.Size(2, width, grid=grid, decoder_width=width, head_dim=width, embedding=width)
    case = registry.benchmark(op).case(size, device)
    with recorded(run=False) as launches:
        for options in ({}, *case.variants):
            out = case.call(*case.inputs, kernels="triton", **options)[0]
            if case.leaves:
                torch.autograd.grad(out, case.leaves, torch.empty_like(out))
    assert kernel_names(op) <= {launch.kernel.__name__ for launch in launches}
    # An op may launch another's kernel too.
    assert configurations(launches) <= set().union(*(configurations(registry.launches(op)) for op in registry.NAMES))
    assert all(re.fullmatch(r"ccmim_\w+_kernel", launch.kernel.__name__) for launch in registry.launches(op))
