"""`ccmim bench`: run a script of benchmarks/."""

import os
import subprocess
import sys
from pathlib import Path

from ccmim_fast.commands import take_name
from ccmim_fast.errors import MachineError

SCRIPTS = {
    "throughput": ("throughput.py", "whole training steps, beside those of other libraries"),
    "ladder": ("ladder.py", "what each saving of a training step gives"),
    "attention": ("attention.py", "attention backends"),
    "data": ("data.py", "loaders, beside torchvision's"),
    "bank": ("bank.py", "what the score bank costs a step"),
    "soak": ("soak.py", "runs that are killed and disturbed, and go on"),
    "scaling": ("scaling.py", "what ranks send each other"),
    "verify": ("verify/run.py", "everything of the GPU path on this GPU, in one report"),
    "ops": ("ops/bench.py", "the ops of ccmim_kernels, beside their floors"),
}


def bench(argv: list[str]) -> None:
    """Run one of `SCRIPTS` in a process of its own, with its exit code; MachineError from a wheel, which has none."""
    names = {name: help for name, (_, help) in SCRIPTS.items()}
    name, rest = take_name("ccmim bench", "benchmark", names, argv)
    root = Path(__file__).resolve().parents[2]
    script = root / "benchmarks" / SCRIPTS[name][0]
    if not script.is_file():
        raise MachineError("ccmim bench: benchmarks/ is not in the wheel; git clone the repository and run it there")
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, script, *rest], env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise SystemExit(done.returncode)
