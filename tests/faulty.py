"""Runs in which something goes wrong at chosen steps; as a script, on one of several ranks."""

import os
import signal
import sys
from unittest.mock import patch

import torch

from ccmim_fast.config.load import load_config
from ccmim_fast.errors import CcmimError
from ccmim_fast.trainer.loop import Trainer, fit
from ccmim_fast.trainer.step import TrainStep


def not_finite(at, value=float("nan")):
    """Within it losses of the steps `at`, counted from 1 in this process, are multiplied by `value`."""
    losses, count = TrainStep.losses, 0

    def spoiled(self, *args):
        nonlocal count
        count += 1
        found, seen = losses(self, *args)
        return (found._replace(total=found.total * value) if count in at else found), seen

    return patch.object(TrainStep, "losses", spoiled)


def signalled(at, number=signal.SIGTERM):
    """Within it this process gets a signal in step `at`."""
    train = Trainer._train

    def asked(self, batches):
        if self.step + 1 == at:
            os.kill(os.getpid(), number)
        return train(self, batches)

    return patch.object(Trainer, "_train", asked)


def main() -> int:
    """FAULT AT RANK [settings]: `nan` or `term` in the steps AT (with commas) of one rank."""
    fault, at, rank, *settings = sys.argv[1:]
    steps = {int(step) for step in at.split(",")}
    if int(os.environ["RANK"]) != int(rank):
        steps = set()
    spoil = not_finite(steps) if fault == "nan" else signalled(min(steps, default=0))
    # The FLOP counter takes a pass of its own before the run.
    with patch("ccmim_fast.trainer.throughput.count_flops", lambda step: {}), spoil:
        try:
            fit(load_config(settings, "test"))
        except CcmimError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
