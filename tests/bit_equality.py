"""Tiny pretraining runs, one per part of the method, and the curves that they give.

The runs use the command line, metrics.jsonl and the checkpoints alone, so that the code behind these may change.

    PYTHONPATH=.:kernels python tests/bit_equality.py CURVES.json

records the curves of the checkout in which it is called: of an older commit, to compare on another machine with
`test_bit_equality.py`, or of this one, where a result is meant to change. `tests/assets/curves_ac1f32c.json` holds
records of commit ac1f32c, one for each maker of processors.
"""

import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

# The arithmetic that every x86-64 machine has. MKL still sums otherwise on Intel's processors than on AMD's.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
FIGURES = ("loss", "recons", "contrast", "entropy", "grad_norm")

# Twenty steps in four epochs; 4 x 6 patches.
COMMON = [
    "--data.source=shapes",
    "--data.samples=40",
    "--data.image_size=[32,48]",
    "--data.loader=torch",
    "--data.workers=1",
    "--model.arch=vit_tiny_patch16_224",
    "--model.patch_size=8",
    "--model.embed_dim=48",
    "--model.depth=2",
    "--model.num_heads=3",
    "--decoder.dim=32",
    "--decoder.depth=2",
    "--decoder.num_heads=4",
    "--heads.dim=16",
    "--score.grid=8",
    "--optim.base_lr=0.05",
    "--optim.warmup_epochs=1",
    "--train.batch_size=8",
    "--train.epochs=4",
    "--train.precision=fp32",
    "--train.device=cpu",
    "--train.attention=sdpa",
    "--run.log_every=1",
    "--run.save_every=100",
    "--run.tensorboard=false",
]

# What each run changes. The first is the default method.
RUNS = {
    "bank": "",
    "bank-unseen-random-align": "--score.unseen=random --score.blocks=1 --contrast.loss=align",
    "bank-moco-accumulate-clip": "--contrast.loss=moco --train.accumulate=2 --optim.clip_grad=0.5",
    "bank-drop-path-ema": "--model.drop_path=0.3 --optim.ema_decay=0.9 --score.momentum=0.9",
    "bank-hog-all-at-once": "--target.kind=hog --contrast.loss=align --model.drop_path=0.2 --optim.ema_decay=0.9 "
    "--train.accumulate=2 --optim.clip_grad=1 --data.flip=true --mask.ratio=0.6",
    "bank-recompute": "--train.recompute=true",
    "bank-bf16": "--train.precision=bf16 --train.attention=plain",
    "first-nce": "--score.source=first",
    "first-align-hog": "--score.source=first --contrast.loss=align --target.kind=hog --target.hog_cell=4",
    "first-importance-moco": "--score.source=first --mask.strategy=importance --contrast.loss=moco",
    "block-nce-temperature": "--score.source=block --score.block=0 --score.temperature=0.5 --contrast.temperature=0.1",
    "block-none": "--score.source=block --score.block=1 --contrast.loss=none",
    "all-renorm-nce": "--score.source=all",
    "all-softmax-align-uniform": "--score.source=all --score.normalise=softmax --contrast.loss=align "
    "--mask.noise=uniform",
    "all-none-raw-pixels": "--score.source=all --contrast.loss=none --target.norm_pix=false",
    "random-nce": "--mask.strategy=random --contrast.weight=1",
    "block-mask-moco": "--mask.strategy=block --mask.block_min=4 --contrast.loss=moco --score.source=all",
    "mae": "--mask.strategy=random --contrast.loss=none --score.source=first",
    "mae-hog-accumulate": "--mask.strategy=random --contrast.loss=none --target.kind=hog --train.accumulate=4",
    "registers-bank": "--model.arch=vit_small_patch14_reg4_dinov2",
    "registers-all-ema": "--model.arch=vit_small_patch14_reg4_dinov2 --score.source=all --optim.ema_decay=0.99",
    "norm-before-blocks-bank": "--model.arch=vit_base_patch16_clip_quickgelu_224",
}


def machine() -> dict[str, str]:
    """Return what the last bit of a result may depend on beside this project's code."""
    makers = re.findall(r"^vendor_id\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", "numpy", "pillow")}
    kind = {"machine": platform.machine(), "processor": makers[0] if makers else ""}
    return {**kind, "libc": " ".join(platform.libc_ver()), **versions}


def record_for(found: dict[str, Any], records: list[dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """Return the record to compare `found` with, and whether it is of this kind of machine: then bits are compared."""
    for record in records:
        if record["machine"] == found["machine"]:
            return record, True
    return records[0], False


def all_curves() -> dict[str, Any]:
    """Run everything in a new process, in the arithmetic of `ENVIRONMENT`.

    Returns:
        machine: see `machine`.
        runs: by the names of `RUNS`, each as `curve`.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "curves.json"
        ran = subprocess.run(
            [sys.executable, __file__, "--here", out],
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if ran.returncode:
            raise RuntimeError(f"the runs ended with exit code {ran.returncode}:\n{ran.stdout[-3000:]}")
        return json.loads(out.read_text())


def curves_here(folder: Path) -> dict[str, Any]:
    """Run everything in this process, below `folder`."""
    skip_measuring()
    runs = {}
    for name, changed in RUNS.items():
        runs[name] = curve([*COMMON, f"--data.root={folder / 'shapes'}", *changed.split()], folder / name)
    return {"machine": machine(), "runs": runs}


def curve(settings: list[str], folder: Path) -> dict[str, Any]:
    """Return the figures of each step of `ccmim pretrain`, and the sums of its last checkpoint; or the `error`.

    Args:
        settings: of `ccmim pretrain`.
        folder: where the run is written.
    """
    from ccmim_fast.cli import main

    try:
        code = main(["pretrain", *settings, f"--run.dir={folder}"])
    except Exception:
        return {"error": traceback.format_exc()}
    if code:
        return {"error": f"ccmim pretrain ended with exit code {code}"}
    return {**figures_of(folder), "sha256": sums_of(folder)}


def figures_of(folder: Path) -> dict[str, list[float | None]]:
    """Return the figures in metrics.jsonl, one number a step; JSON keeps every bit of a float."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    return {name: [step[name] for step in steps] for name in FIGURES}


def sums_of(folder: Path) -> dict[str, str]:
    """Return the sha256 of the weights, the averaged weights and the bank's maps in the newest checkpoint."""
    import torch

    newest = max((folder / "checkpoints").glob("step_*"))
    state = torch.load(newest / "state.pt", weights_only=True)
    kept = {"model": state["model"], "ema": state["ema"], "maps": {"maps": state["maps"]}}
    if state["maps"] is None:
        del kept["maps"]
    return {name: _sum(tensors) for name, tensors in kept.items() if tensors is not None}


def _sum(tensors: dict[str, Any]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def skip_measuring() -> None:
    """Replace the rate of matrix products, which a run measures for seconds and no result depends on."""
    import ccmim_fast

    root = Path(ccmim_fast.__file__).parent
    for path in root.rglob("*.py"):
        if "\ndef measure_matmul_rate(" in path.read_text():
            name = ".".join(("ccmim_fast", *path.relative_to(root).with_suffix("").parts))
            importlib.import_module(name).measure_matmul_rate = lambda *_: 1.0


def main(argv: list[str]) -> None:
    if argv[0] == "--here":
        with tempfile.TemporaryDirectory() as folder:
            Path(argv[1]).write_text(json.dumps(curves_here(Path(folder))))
        return
    found = all_curves()
    runs = ",\n".join(f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in found["runs"].items())
    Path(argv[0]).write_text(f'[{{"machine": {json.dumps(found["machine"])},\n "runs": {{\n{runs}\n}}}}]\n')


if __name__ == "__main__":
    main(sys.argv[1:])
