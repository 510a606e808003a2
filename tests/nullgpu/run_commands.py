"""This script runs commands of `ccmim` on the null device, and tells how each ended: `run_commands.py < given.json`."""

import contextlib
import faulthandler
import io
import json
import os
import sys
import time

import torch
from nullgpu.counters import bools_are, counted, tell, without_cudnn
from nullgpu.take_steps import one_line

from ccmim_fast import cli
from ccmim_fast.engine import build, step_monitor
from ccmim_fast.evaluation.masks import objects, scores


def outcome(argv: list[str]) -> dict:
    """Run a command in this process: exit code, what it printed, an error that nobody caught, and what it launched."""
    out, err, error, start = io.StringIO(), io.StringIO(), None, time.perf_counter()
    with counted() as counts, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(argv)
        except SystemExit as exit:
            code = exit.code
        except Exception as failure:
            code, error = None, one_line(failure)
    own = {name: n for name, n in counts.names("kernel").items() if name.startswith("ccmim_")}
    return {
        "code": code or 0 if error is None else None,
        "error": error,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "launches": counts.launches,
        "own kernels": own,
        "graphs": counts.events("graph", "launch"),
        "refused": counts.names("refused"),
        "changed": counts.events("graph", "reads host memory that changed"),
        "seconds": time.perf_counter() - start,
    }


def with_what_no_kernel_computes() -> None:
    """Let each step be a good one that nobody asked to stop, and torch find a rate on the device positive.

    Masks and scores are what the memory held before: figures of where objects lie, which refuse some, are all 0.
    """
    # A memset, which the device does carry out.
    step_monitor.max_over_ranks = torch.Tensor.zero_
    for place in (objects, scores):
        place.object_leakage = place.score_auroc = lambda *_: 0.0
    plain = build.build_optimizer

    def checked(*arguments, **named):
        with bools_are(True):
            return plain(*arguments, **named)

    build.build_optimizer = checked


if __name__ == "__main__":
    faulthandler.enable()
    without_cudnn()
    with_what_no_kernel_computes()
    with bools_are(False):  # such as whether an eigenvalue was not found
        for name, argv in json.load(sys.stdin).items():
            tell(name, outcome(argv))
    os._exit(0)  # torch gives back what it holds; without its cache that takes minutes
