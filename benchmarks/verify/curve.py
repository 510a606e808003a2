"""Hold the losses of a short training on a GPU against those of the same training on the CPU.

    python benchmarks/verify/curve.py [--steps 48] [--folder runs/verify-gpu/curve]

Every draw is keyed: two devices see the same images, masks and weights, and only rounding is theirs. How far rounding
alone leads is measured: a third training is the CPU's with another order of summation (no vector instructions, one
thread). The GPU passes if at every step it is at most `MARGIN` times as far from the CPU. Each training is float32,
without TF32. Exit status 1: a curve is further away, or not finite.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

MARGIN = 10
LEAST = 1e-5  # of the loss: what one step may differ by, however alike the two CPU curves are
OTHER_ROUNDING = {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"}
SETTINGS = [
    "--data.source=shapes",
    "--data.samples=256",
    "--data.image_size=[64,96]",
    "--data.loader=torch",
    "--data.workers=1",
    "--model.arch=vit_tiny_patch16_224",
    "--model.depth=4",
    "--decoder.dim=64",
    "--decoder.num_heads=4",
    "--heads.dim=32",
    "--optim.base_lr=0.01",
    "--optim.warmup_epochs=1",
    "--train.batch_size=32",
    "--train.precision=fp32",
    "--run.log_every=1",
    "--run.save_every=1000",
    "--run.tensorboard=false",
    "--run.overwrite=true",
]
# The paper's score of the first block, our default, and MAE.
METHODS = {
    "ccMIM, first block": ["--score.source=first"],
    "ccMIM, bank": ["--score.source=bank"],
    "MAE": ["--mask.strategy=random", "--contrast.loss=none", "--score.source=first"],
}


def train(folder: Path, device: str, steps: int, more: list[str], environment: dict[str, str] | None = None) -> list:
    """Return the loss of every step of `ccmim pretrain` on `device`.

    Raises:
        RuntimeError: the command failed; the message is its last line.
    """
    own = [f"--data.root={folder.parent / 'shapes'}", f"--run.dir={folder}", f"--train.device={device}"]
    command = [sys.executable, "-m", "ccmim_fast.cli", "pretrain", *SETTINGS, *more, *own]
    command += [f"--train.epochs={-(-steps // 8)}", f"--train.max_steps={steps}"]
    done = subprocess.run(command, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise RuntimeError(f"{folder.name}: exit status {done.returncode}: {said[-1]}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def differences(losses: list[float], expected: list[float]) -> list[float]:
    """Return the relative difference of each step's loss; infinite where it is missing or not finite."""
    found = [abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in zip(losses, expected)]
    return found + [math.inf] * (len(expected) - len(found))


def verdict(gpu: list[float], cpu: list[float], other: list[float]) -> dict:
    """Say how far the GPU's curve is from the CPU's, and whether at every step rounding explains it.

    Rounding grows from step to step: what is allowed at a step is `MARGIN` times the furthest that the other order of
    summation has been until then.

    Returns:
        furthest: the largest relative difference of a step.
        step: the first one, from 1 on, that is further away than allowed; 0: none.
        allowed: at that step, or at the last.
    """
    far = itertools.accumulate(differences(other, cpu), max)
    allowed = [max(MARGIN * reached, LEAST) for reached in far]
    found = differences(gpu, cpu)
    step = next((number for number, pair in enumerate(zip(found, allowed), 1) if not pair[0] <= pair[1]), 0)
    return {"furthest": max(found), "step": step, "allowed": allowed[step - 1]}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("curve", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, default=Path("runs/verify-gpu/curve"))
    parser.add_argument("--only-run", action="store_true", help="on a device that computes nothing: no figure is held")
    options = parser.parse_args(arguments)
    failed = False
    for number, (method, more) in enumerate(METHODS.items()):
        folder = options.folder / str(number)
        quick = ["--train.compile=off"] if options.only_run else []
        gpu = train(folder / "gpu", options.device, options.steps, [*more, *quick])
        if options.only_run:
            print(f"{method}: {len(gpu)} steps")
            continue
        cpu = train(folder / "cpu", "cpu", options.steps, more)
        other = train(folder / "cpu-other-rounding", "cpu", options.steps, more, OTHER_ROUNDING)
        found = verdict(gpu, cpu, other)
        failed |= found["step"] > 0
        said = f"FAILED at step {found['step']}" if found["step"] else "passed"
        print(
            f"{method}: loss {cpu[0]:.4f} to {cpu[-1]:.4f} in {options.steps} steps; furthest step off by "
            f"{found['furthest']:.1e}, allowed {found['allowed']:.1e}: {said}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
