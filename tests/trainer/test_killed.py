"""Ranks killed at any moment and launched again by torchrun: the run ends as if nothing had been (fault 18)."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ccmim_fast.checkpoints import io

KILLS = 2  # benchmarks/soak.py does a hundred


def command(folder, kills):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={kills}"]
    given = ["--data.source=shapes", f"--data.root={folder.parent / 'shapes'}", "--data.samples=48"]
    given += ["--data.image_size=[32,32]", "--data.loader=torch", "--decoder.dim=32", "--decoder.num_heads=4"]
    given += ["--model.arch=vit_tiny_patch16_224", "--model.patch_size=8", "--model.embed_dim=48", "--model.depth=2"]
    given += ["--model.num_heads=3", "--train.batch_size=16", "--train.epochs=60", "--train.precision=fp32"]
    given += ["--train.device=cpu", "--run.save_every=1", "--run.tensorboard=false", "--run.resume=auto"]
    return [sys.executable, *launcher, "-m", "ccmim_fast.cli", "pretrain", f"--run.dir={folder}", *given]


def children(pid):
    """Processes that `pid` launched, as the kernel tells."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def train(folder, kills=0):
    """Run to the end, killing a rank `kills` times, each a moment after a checkpoint appeared; its newest state."""
    draw = random.Random(0)
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        agent = subprocess.Popen(command(folder, kills), stdout=log, stderr=log, env=environment)
        for _ in range(kills):
            known = len(io.checkpoints(folder / "checkpoints"))
            newest = io.checkpoints(folder / "checkpoints")[-1:]
            while agent.poll() is None and io.checkpoints(folder / "checkpoints")[-1:] == newest:
                time.sleep(0.02)
            time.sleep(draw.random() * 0.5)
            ranks = children(agent.pid)
            assert agent.poll() is None, f"the run ended before it was killed; {known} checkpoints"
            os.kill(draw.choice(ranks), signal.SIGKILL)
        assert agent.wait(timeout=240) == 0, Path(log.name).read_text()[-2000:]
    return io.newest(folder / "checkpoints").state


@pytest.mark.slow
def test_killed_ranks_come_back_and_the_weights_are_those_of_a_run_that_was_left_alone(tmp_path):
    whole, killed = train(tmp_path / "whole"), train(tmp_path / "killed", KILLS)
    assert killed["progress"] == whole["progress"]
    for name, weight in whole["model"].items():
        assert torch.equal(weight, killed["model"][name]), name
    assert torch.equal(whole["maps"], killed["maps"])
