"""Every kernel, in every configuration its launcher can choose, compiles for nine GPU generations without spilling."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ccmim_kernels import (
    cls_row,
    divide_tokens,
    gather_tokens,
    hog_target,
    info_nce,
    masked_patch_loss,
    moco_nce,
    restore_tokens,
    sample_partition,
)
from ccmim_kernels.launch import recorded

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks" / "ops"))

import catalogue  # noqa: E402 (benchmarks are scripts, no package)


@pytest.mark.slow
def test_compiles_for_every_generation_without_spills():
    # A process of its own: in the interpreter kernels are Python functions, which cannot be compiled.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, str(ROOT / "benchmarks" / "ops" / "ahead_of_time.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for name in kernel_names():
        assert f"| {name} |" in done.stdout


def kernel_names() -> set[str]:
    """Every function of the package that can be launched: its name ends in `_kernel`."""
    sources = (ROOT / "kernels" / "ccmim_kernels").rglob("triton_impl.py")
    lines = [line for path in sources for line in path.read_text().splitlines()]
    return {line[4:].partition("(")[0] for line in lines if line.startswith("def ") and "_kernel(" in line}


def configurations(launches) -> set[tuple]:
    return {(launch.kernel.__name__, launch.constants, launch.warps, launch.fp_fusion) for launch in launches}


@pytest.mark.parametrize("width", [768, 100, 3])
@pytest.mark.parametrize("grid", [(2, 2), (14, 14), (20, 20), (32, 40)])
def test_the_catalogue_holds_what_is_launched(grid, width, device):
    """Public calls of many sizes choose no configuration that was not compiled ahead of time."""
    patches, keep = grid[0] * grid[1], grid[0] * grid[1] // 4
    where = {"grid": grid, "keep": keep, "seed": 0, "epoch": 0, "kernels": "triton"}
    tokens = torch.empty(2, patches, width, device=device, requires_grad=True)
    prefix = torch.empty(1, width, device=device, requires_grad=True)
    rows = torch.empty(2, patches, device=device)
    ids = torch.empty(2, dtype=torch.int64, device=device)
    images = torch.empty(2, grid[0] * 16, grid[1] * 16, 3, dtype=torch.uint8, device=device)
    stats = torch.empty(3, device=device)
    with recorded(run=False) as launches:
        sample_partition(rows, ids, **where)
        sample_partition(None, ids, strategy="block", **where)
        out = divide_tokens(tokens, prefix, ids, direction_D=torch.empty(width, device=device), **where)
        out.visible.sum().backward()
        q, k = tokens[:, 0].unflatten(1, (1, width)), tokens.unflatten(2, (1, width))
        cls_row(q, k, prefix=1, kind="softmax", scale=1.0, kernels="triton")
        gather_tokens(tokens, out.partition.ids_visible_BK, kernels="triton").sum().backward()
        positions = torch.empty(patches + 1, width, device=device)
        token = torch.empty(width, device=device, requires_grad=True)
        visible = out.visible.detach().requires_grad_()
        restore_tokens(visible, token, out.partition.ids_restore_BL, positions, kernels="triton").sum().backward()
        masked = out.partition.ids_masked_BM
        pred = torch.empty(2, patches - keep, 768, device=device, requires_grad=True)
        for norm_pix in (True, False):
            options = {"patch": 16, "mean_C": stats, "std_C": stats, "norm_pix": norm_pix, "kernels": "triton"}
            masked_patch_loss(pred, images, masked, **options).backward()
        hog_target(images, masked, patch=16, kernels="triton")
        h = torch.empty(40, width, device=device, requires_grad=True)
        info_nce(h, h, tau=0.1, kernels="triton").backward()
        moco_nce(h, h, tau=0.1, kernels="triton").backward()
    with recorded(run=False) as compiled:
        for op in catalogue.OPS.values():
            op()
    assert {launch.kernel.__name__ for launch in launches} == kernel_names()
    assert configurations(launches) <= configurations(compiled)
