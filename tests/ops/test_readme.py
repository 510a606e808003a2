"""The example in kernels/README.md runs as it stands."""

import re
from pathlib import Path

import torch


def test_the_example_runs():
    text = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    try:
        exec(code, names)
    finally:
        torch.set_default_device(None)
    assert names["loss"].isfinite()
    assert names["pred"].grad.abs().sum() > 0
    assert len(code.strip().splitlines()) < 16
