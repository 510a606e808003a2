"""This script takes steps as rank 0 of many, and tells what a rank sends: `take_rank_steps.py < cases.json`."""

import json
import sys
from pathlib import Path

import torch
from nullgpu.counters import counted, no_waits, tell, without_cudnn
from nullgpu.first_rank import rank_0_of
from ranks import Run

from ccmim_fast.config.load import load_config
from ccmim_fast.engine.build import build_step, check_device
from ccmim_fast.ranks.session import Session

DDP_LOGS = 10  # steps


def outcome(settings: list[str], images: int, here: Session) -> dict:
    """Take steps until no host waits, and one more that is counted."""
    accumulate = load_config(settings, "test").train.accumulate
    config = load_config([*settings, f"--train.batch_size={images * accumulate * here.world_size}"], "test")
    check_device(config, here)
    run = Run(build_step(config, here), here, images, accumulate)
    waits = []
    for _ in range(DDP_LOGS + 1):
        with counted() as counts:
            run.step_and_flags()
        waits.append(counts.names("wait"))
        list(run.monitor.completed())
    with counted() as counts, no_waits():
        run.step_and_flags()
    model = run.step.model
    return {
        "waits": waits,
        "refused": counts.names("refused"),
        "calls": counts.names("collective"),
        "bytes": {op: counts.amount("collective", op) for op in counts.names("collective")},
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "peak": torch.cuda.max_memory_allocated()
    }


if __name__ == "__main__":
    without_cudnn()
    for name, (gpus, images, settings) in json.load(sys.stdin).items():
        with rank_0_of(gpus) as here:
            tell(name, outcome(["--train.device=cuda", "--train.compile=off", *settings], images, here))
