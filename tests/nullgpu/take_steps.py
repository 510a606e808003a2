"""This script takes steps on the null device, and tells what happened in each: `take_steps.py < cases.json`."""

import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from nullgpu.counters import Counts, counted, no_waits, tell, without_cudnn
from nullgpu.steps import build_run


def outcome(settings: Sequence[str]) -> dict:
    """Take three steps, the last of which is counted; a failure is told as one line."""
    try:
        run = build_run(settings)
        for _ in range(2):
            run.take()
        torch.cuda.synchronize()
        with counted() as counts, no_waits():
            run.take()
        return {"error": None, **described(counts)}
    except Exception as error:
        return {"error": one_line(error)}


def described(counts: Counts) -> dict:
    """Return what the tests ask of a step."""
    own = {name for name in counts.names("kernel") if name.startswith("ccmim_")}
    shares = {name: counts.share(name) for name in ("bf16", "fp16", "tf32", "fp32")}
    return {
        "launches": counts.launches,
        "waits": counts.names("wait"),
        "to host": counts.events("copy", "D2H"),
        "pageable": counts.events("copy", "pageable"),
        "refused": counts.names("refused"),
        "shares": shares,
        "kernels": sorted(own),
    }


def one_line(error: Exception) -> str:
    """Return type, place in our code and message of an error."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "ccmim_" in frame.filename]
    place = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}{place}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    without_cudnn()
    for name, settings in json.load(sys.stdin).items():
        tell(name, outcome(settings))
