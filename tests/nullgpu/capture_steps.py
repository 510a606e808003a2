"""This script captures steps on the null device, and tells what each did: `capture_steps.py < cases.json`."""

import json
import sys
from collections.abc import Sequence

import torch
from nullgpu.counters import counted, no_waits, tell, without_cudnn
from nullgpu.steps import build_run
from nullgpu.take_steps import one_line


def outcome(settings: Sequence[str]) -> dict:
    """Capture a step, overwrite all pinned memory that is free, and replay the step, counting."""
    try:
        run = build_run([*settings, "--train.cuda_graph=true"])
        with counted() as capture:
            run.take()
        overwrite_pinned_memory()
        with counted() as replay, no_waits():
            run.take()
    except Exception as error:
        return {"error": one_line(error)}
    return {
        "error": None,
        "refused": capture.names("refused") | replay.names("refused"),
        "nodes": capture.amount("graph", "captured"),
        "replays": replay.events("graph", "launch"),
        "changed": replay.events("graph", "changed"),
        "waits": replay.names("wait"),
        "to host": replay.events("copy", "D2H"),
        "outside": replay.launches,
    }


def overwrite_pinned_memory() -> None:
    """Take what torch's allocator would hand out next in each of its sizes, powers of two, and write over it."""
    torch.cuda.synchronize()
    for bits in range(6, 21):
        taken = [torch.empty(2**bits, dtype=torch.uint8, pin_memory=True) for _ in range(16)]
        for memory in taken:
            memory.fill_(255)


if __name__ == "__main__":
    without_cudnn()
    for name, settings in json.load(sys.stdin).items():
        tell(name, outcome(settings))
