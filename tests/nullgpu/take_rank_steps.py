"""This script takes steps as rank 0 of many, and tells what a rank sends: `take_rank_steps.py < cases.json`."""

import json
import sys

from nullgpu.counters import counted, no_waits, tell, without_cudnn
from nullgpu.first_rank import rank_0_of
from nullgpu.steps import Run, build_run

from ccmim_fast.engine.step_monitor import StepMonitor
from ccmim_fast.ranks.session import Session


def outcome(settings: list[str], steps: int, here: Session) -> dict:
    """Take steps; tells in which of them the host waited, and what the last one sent."""
    run, monitor, waits = build_run(settings, here), StepMonitor(here), []
    for _ in range(steps - 1):
        with counted() as counts:
            take(run, monitor)
        waits.append(counts.names("wait"))
        list(monitor.completed())
    with counted() as counts, no_waits():
        take(run, monitor)
    sent = {name: [n, amount] for (kind, name), (n, amount) in counts.items() if kind == "collective"}
    weights = run.step.model.parameters()
    return {
        "waits in": [number for number, names in enumerate([*waits, counts.names("wait")], 1) if names],
        "sent": sent,
        "parameters": sum(p.numel() for p in weights if p.requires_grad),
    }


def take(run: Run, monitor: StepMonitor) -> None:
    """Take a step, and share its flags with the other ranks."""
    monitor.submit(0, run.take().gradients.bad, stop=False)


if __name__ == "__main__":
    without_cudnn()
    for name, (gpus, steps, settings) in json.load(sys.stdin).items():
        with rank_0_of(gpus) as here:
            tell(name, outcome(settings, steps, here))
