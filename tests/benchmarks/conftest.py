"""The benchmarks' modules, which lie in no package, and a model small enough for a process each."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

# ViT of two narrow blocks on 16 patches; the settings reach our contenders only.
SMALL = [
    "--device=cpu",
    "--precision=fp32",
    "--arch=vit_tiny_patch16_224",
    "--image-size=32",
    "--batch=2",
    "--rounds=1",
]
NARROW = ["--model.patch_size=8", "--model.embed_dim=48", "--model.num_heads=3", "--model.depth=2", "--decoder.dim=32"]
NARROW.append("--train.compile=off")  # which a run of ImageNet's length would try, also of a small model

PEER = '''
"""A step that learns one number; it finds a module beside it."""
import torch
from beside import START

def build(arch, images_BHWC, precision):
    assert arch == "vit_tiny_patch16_224" and precision == "fp32"
    assert images_BHWC.shape == (2, 32, 32, 3) and images_BHWC.dtype == torch.uint8
    weight = torch.full((), START, requires_grad=True)
    def step():
        loss = (weight * torch.ones(8, 8)).mm(torch.ones(8, 8)).mean()
        loss.backward()
        with torch.no_grad():
            weight.sub_(weight.grad)
        weight.grad = None
        return loss.detach()
    return step

def broken(arch, images_BHWC, precision):
    return lambda: torch.tensor(float("nan"))

def failing(arch, images_BHWC, precision):
    raise RuntimeError("no such kernel\\nof this size")
'''


@pytest.fixture
def peer(tmp_path) -> Path:
    """A file with three peers."""
    (tmp_path / "beside.py").write_text("START = 3.0\n")
    path = tmp_path / "others.py"
    path.write_text(PEER)
    return path


@pytest.fixture
def small(tmp_path) -> list[str]:
    """Options; a run that a test does not expect writes no result into the checkout."""
    return [*SMALL, *NARROW, f"--out={tmp_path / 'unexpected'}"]


@pytest.fixture
def module():
    """A module of benchmarks/ by name."""
    return importlib.import_module
