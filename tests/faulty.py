"""Runs in which something goes wrong at chosen steps; as a script, on one of several ranks."""

import contextlib
import errno
import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from ccmim_fast.checkpoints import io
from ccmim_fast.cli import main as ccmim
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.engine.pretraining import Pretraining
from ccmim_fast.engine.step import TrainStep


def not_finite(at, value=float("nan")):
    """Within it losses of the steps `at`, counted from 1 in this process, are multiplied by `value`."""
    losses, count = TrainStep.losses, 0

    def spoiled(self, *args):
        nonlocal count
        count += 1
        found, seen = losses(self, *args)
        return (found._replace(total=found.total * value) if count in at else found), seen

    return patch.object(TrainStep, "losses", spoiled)


def in_step(at, act):
    """Within it `act` is called at the beginning of step `at`."""
    train = Pretraining.train

    def acting(self, batches, step, seen):
        if step + 1 == at:
            act()
        return train(self, batches, step, seen)

    return patch.object(Pretraining, "train", acting)


def signalled(at, number=signal.SIGTERM):
    """Within it this process gets a signal in step `at`."""
    return in_step(at, lambda: os.kill(os.getpid(), number))


def recorded_ids(file):
    """Within it each step writes the ids of its samples: a line [step, ids]."""
    train = Pretraining.train

    def recording(self, batches, step, seen):
        with open(file, "a") as lines:
            ids = np.concatenate([batch.host_ids_B for batch in batches]).tolist()
            lines.write(json.dumps([step + 1, ids]) + "\n")
        return train(self, batches, step, seen)

    return patch.object(Pretraining, "train", recording)


def image(at, act):
    """Within it `act` is called, in a loader's thread, before the image number `at` is decoded."""
    decode, count = ShapesSource.decode, 0

    def acting(self, index):
        nonlocal count
        count += 1
        if count == at:
            act()
        return decode(self, index)

    return patch.object(ShapesSource, "decode", acting)


def hold(flag):
    """What the first one to call it does for ever, and no later one."""
    if not flag.exists():
        flag.touch()
        time.sleep(600)


def other_images():
    """Within it this process has other images, though as many."""
    init = ShapesSource.__init__

    def built(self, *args):
        init(self, *args)
        self.fingerprint = "others"

    return patch.object(ShapesSource, "__init__", built)


def full_disk():
    """Within it no checkpoint can be written."""

    def written(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return patch.object(io, "_write", written)


def stop():
    """After a moment, in which it says where it is."""
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGSTOP)


def fail():
    raise MemoryError("no memory for an image")


FAULTS = {
    "nan": not_finite,
    "term": lambda steps: signalled(min(steps)),
    "kill": lambda steps: signalled(min(steps), signal.SIGKILL),
    "stop": lambda steps: in_step(min(steps), stop),
    "thread": lambda images: image(min(images), fail),
    "blocked": lambda images: image(min(images), lambda: time.sleep(600)),
    "hold": lambda steps: in_step(min(steps), lambda: hold(Path(os.environ["HELD"]))),
    "full": lambda _: full_disk(),
    "images": lambda _: other_images(),
    "ids": lambda _: recorded_ids(Path(os.environ["IDS"]) / f"{os.environ.get('RANK', '0')}.jsonl"),
}


def main() -> int:
    """FAULT AT RANK [settings]: one of `FAULTS` at the steps or images AT (with commas) of one rank, or of `all`."""
    fault, at, rank, *settings = sys.argv[1:]
    concerned = rank in ("all", os.environ.get("RANK"))
    spoil = FAULTS[fault]({int(step) for step in at.split(",")}) if concerned else contextlib.nullcontext()
    # Both take a while before the run, for figures that nobody reads here.
    counted = patch("ccmim_fast.engine.pretraining.count_flops", lambda step: {})
    measured = patch("ccmim_fast.profile.meter.measure_matmul_rate", lambda device, dtype: 1e12)
    with counted, measured, spoil:
        return ccmim(["pretrain", *settings])


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
