"""This script compiles steps on the null device, and tells what became of them: `compile_steps.py < cases.json`.

With the argument `traced` the graphs are made and run as they are, which is what decides whether another is made;
without it inductor compiles them for the device.
"""

import json
import sys
from collections.abc import Sequence

import torch
from nullgpu.counters import counted, no_waits, tell, without_cudnn
from nullgpu.steps import Run, build_run
from nullgpu.take_steps import described, one_line
from torch._dynamo.utils import counters

from ccmim_fast.engine.compile import compile_step, vit_blocks, warm_up


def outcome(settings: Sequence[str], traced: bool) -> dict:
    """Build a compiled run, then take the first steps on batches of its loader; the last is counted."""
    torch._dynamo.reset()
    counters.clear()
    try:
        run = build_traced(settings) if traced else build_run(settings)
        warmed_up = graphs()
        run.take()
        first = graphs()
        run.take()
        with counted() as counts, no_waits():
            run.take()
    except Exception as error:
        return {"error": one_line(error)}
    return {
        "error": None,
        "compiled": is_compiled(run),
        "graphs": [warmed_up, first, graphs()],
        "breaks": dict(counters["graph_break"]),
        "fused": sum(events for name, events in counts.names("kernel").items() if name.startswith("triton_")),
        **described(counts),
    }


def build_traced(settings: Sequence[str]) -> Run:
    """Build a run whose step is one graph that runs as it is traced, warmed up like a compiled one."""
    run = build_run([*settings, "--train.compile=off"])
    compile_step(run.step, "step", backend=lambda graph, inputs: graph.forward)
    warm_up(run.step, len(run.batches[0].images_BHWC), len(run.batches))
    return run


def graphs() -> int:
    """Return how many graphs torch.compile has made so far."""
    return counters["stats"]["unique_graphs"]


def is_compiled(run: Run) -> bool:
    """Return whether the step still runs compiled: a failure of the warm-up makes it eager."""
    return run.step.forward != run.step.losses or any("compute" in vars(block) for block in vit_blocks(run.step.model))


if __name__ == "__main__":
    without_cudnn()
    for name, settings in json.load(sys.stdin).items():
        tell(name, outcome(settings, traced="traced" in sys.argv))
