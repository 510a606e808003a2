"""This benchmark kills ranks, which torchrun launches again; the run must end like an undisturbed one.

    ccmim bench soak [--kills 100] [--seed 0] [--section.key=value ...]
    ccmim bench soak --minutes 60 ...           faults of all kinds, memory and handles: see soak_hour.py

Two ranks on this CPU train a small model with a score bank, a checkpoint each epoch. The first run has no kill; in the
second, `kill -9` hits a random rank, a random moment after a checkpoint appeared. Weights and maps must be equal bit
for bit; else the exit code is 1. Results: benchmarks/results/soak-<date>-<device>.md and .json.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command_line
import pages
import soak_hour
import torch
from soak_faults import FAULTS

from ccmim_fast.checkpoints import io
from ccmim_fast.config.load import load_config
from ccmim_fast.config.parser import Parser
from ccmim_fast.errors import ConfigError, MachineError

RANKS = 2
MOMENT = 0.5  # seconds; a checkpoint comes every 0.3, so kills fall on steps, saves and the time between them
PATIENCE = 600  # seconds without a new checkpoint


def command(folder: Path, epochs: int, restarts: int, settings: Sequence[str] = ()) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    launcher += [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    given = ["--data.source=shapes", f"--data.root={folder.parent / 'shapes'}", "--data.samples=48"]
    given += ["--data.image_size=[32,32]", "--data.loader=torch", "--decoder.dim=32", "--decoder.num_heads=4"]
    given += ["--model.arch=vit_tiny_patch16_224", "--model.patch_size=8", "--model.embed_dim=48", "--model.depth=2"]
    given += ["--model.num_heads=3", "--train.batch_size=16", f"--train.epochs={epochs}", "--train.precision=fp32"]
    given += ["--train.device=cpu", "--run.save_every=1", "--run.tensorboard=false", "--run.resume=auto"]
    given += ["--optim.warmup_epochs=5"]
    return [sys.executable, *launcher, "-m", "ccmim_fast.cli", "pretrain", f"--run.dir={folder}", *given, *settings]


def train(folder: Path, epochs: int, kills: int, draw: random.Random, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Train to the end with `kills` kills; return the state of the last checkpoint.

    Raises:
        MachineError: the run failed, was stuck, or ended before all kills were done.
    """
    log_path = folder.with_suffix(".log")
    with log_path.open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        agent = subprocess.Popen(command(folder, epochs, kills, settings), stdout=log, stderr=log, env=environment)
        try:
            done = 0
            while done < kills:
                _await_checkpoint(folder, agent, log_path)
                time.sleep(MOMENT * draw.random())
                ranks = _children(agent.pid)
                if len(ranks) == RANKS and agent.poll() is None:
                    os.kill(draw.choice(ranks), signal.SIGKILL)
                    done += 1
                    print(f"kill {done} after {io.checkpoints(folder / 'checkpoints')[-1].name}", flush=True)
            if agent.wait(timeout=PATIENCE):
                raise MachineError(f"the run ended with {agent.returncode}: {log_path.read_text()[-1000:]}")
        finally:
            agent.kill()
    return io.newest(folder / "checkpoints").state


def _await_checkpoint(folder: Path, agent: subprocess.Popen, log: Path) -> None:
    newest, start = io.checkpoints(folder / "checkpoints")[-1:], time.monotonic()
    while io.checkpoints(folder / "checkpoints")[-1:] == newest:
        if agent.poll() is not None:
            raise MachineError(f"the run ended with {agent.returncode} before its time: {log.read_text()[-1000:]}")
        if time.monotonic() - start > PATIENCE:
            raise MachineError(f"no new checkpoint in {PATIENCE} seconds: {log.read_text()[-1000:]}")
        time.sleep(0.02)


def _children(pid: int) -> list[int]:
    """Return the living processes that `pid` launched."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return True if progress, weights and maps are the same bit for bit."""
    weights = all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())
    return a["progress"] == b["progress"] and weights and torch.equal(a["maps"], b["maps"])


def parse(arguments: list[str]) -> Namespace:
    made = Parser("ccmim bench soak", description=__doc__.split("\n")[0], allow_abbrev=False)
    made.add_argument("--kills", type=int, default=100)
    made.add_argument("--seed", type=int, default=0, help="of the moments")
    made.add_argument("--minutes", type=float, help="another soak: faults of all kinds for so long")
    made.add_argument("--kinds", type=lambda text: text.split(","), default=[*FAULTS], help="of the faults, by commas")
    made.add_argument("--work", type=Path, help="folder that keeps images, output and metrics; default: none")
    made.add_argument("--out", type=Path, help="path of the results, without a suffix")
    made.epilog = "Any further --section.key=value is a setting of the job."
    options, options.settings = made.parse_known_args(arguments)
    load_config(options.settings, made.prog)  # reports a wrong setting before anything runs
    if options.kills < 1 or (options.minutes is not None and not options.minutes > 0):
        raise ConfigError(f"--kills={options.kills} must be at least 1, --minutes={options.minutes} more than 0")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.minutes is not None:
        return soak_hour.main(options, arguments)
    options.device, options.precision, options.threads = "cpu", "fp32", 1
    environment, epochs = pages.environment("soak", arguments, options), 30 + 5 * options.kills
    with tempfile.TemporaryDirectory() as at:
        draw, start = random.Random(options.seed), time.perf_counter()
        whole = train(Path(at) / "whole", epochs, 0, draw, options.settings)
        left_alone = time.perf_counter() - start
        killed = train(Path(at) / "killed", epochs, options.kills, draw, options.settings)
    seconds = time.perf_counter() - start - left_alone
    same = equal(whole, killed)
    result = {"environment": environment, "kills": options.kills, "epochs": epochs, "same": same}
    result |= {"seconds_left_alone": left_alone, "seconds_killed": seconds}
    body = pages.table(
        [
            ["left alone", "0", f"{left_alone:.0f}", ""],
            ["killed", str(options.kills), f"{seconds:.0f}", "the same bit for bit" if same else "**others**"],
        ],
        ["run", "kills", "seconds", "weights and maps"],
    )
    note = f"{RANKS} ranks, {epochs} epochs of 3 steps. A kill costs the launch of {RANKS} processes."
    prefix = pages.prefix_of("soak", options, environment)
    print(f"\n{body}\n")
    pages.write(result, prefix, pages.page("Killed and launched again", result, note, body), lambda path: None)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(command_line.run_main(main, sys.argv[1:]))
