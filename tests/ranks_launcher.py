"""Tests launch ranks here: a function in the processes of a group, or a command with or without torchrun."""

import contextlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

TESTS = str(Path(__file__).parent)
FAULTY = str(Path(TESTS) / "faulty.py")
PATIENCE = 300  # seconds, for a machine with much to do
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# FSDP2 on CPUs is refused there, see `ranks.fsdp.check_mean`.
needs_mean = pytest.mark.skipif(torch.__version__.startswith("2.7."), reason="gloo of torch 2.7 does not average")


# Processes are forked from one that has imported all this already, which alone would take each of them 5 seconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch.distributed", "timm", "ccmim_fast.engine.pretraining"])


def run_in_ranks(target, world_size, folder, *arguments):
    """Run `target(rank, world_size, *arguments)` in the processes of a gloo group; all must end with code 0."""
    group = [(target, rank, world_size, f"{folder}/rendezvous", *arguments) for rank in range(world_size)]
    assert exit_codes(_rank, group) == [0] * world_size


def _rank(target, rank, world_size, rendezvous, *arguments):
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    target(rank, world_size, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(world_size, *command, **environment):
    """Run a script (or `-m` and a module) in ranks as torchrun would, one as without it; all must end with code 0.

    Args:
        environment: more variables.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **ONE_THREAD, **environment}
        alone = [{}]  # without torchrun
        of_ranks = ranks_environment(world_size) if world_size > 1 else alone
        group = [(command, environment | more, f"{folder}/{rank}") for rank, more in enumerate(of_ranks)]
        codes = exit_codes(_command, group)
        assert codes == [0] * world_size, "".join(Path(output).read_text()[-3000:] for *_, output in group)


def _command(command, environment, output):
    """Run a command in this process, as a new one would."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")


def exit_codes(target, of_each):
    """Call `target` with the arguments of each in a process of its own; who takes too long is killed."""
    ranks = [processes.Process(target=target, args=arguments) for arguments in of_each]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(PATIENCE)
        rank.kill()
        rank.join()
    return [rank.exitcode for rank in ranks]


def ranks_environment(world_size):
    """What torchrun would tell each rank of one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    return [{**address, **sizes, "RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(world_size))]


def torchrun(world_size, *command):
    """Run a script with its arguments under torchrun, which ends all ranks when one fails; one must.

    Returns:
        The `CompletedProcess`, with output and errors as text.
    """
    line = [*torchrun_command("--standalone", f"--nproc-per-node={world_size}"), *command]
    environment = {**os.environ, **ONE_THREAD}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert done.returncode != 0, done.stderr[-3000:]
    return done


def torchrun_command(*options):
    return [sys.executable, "-m", "torch.distributed.run", *options]


@contextlib.contextmanager
def ranks_without_torchrun(world_size, folder, *command):
    """Start a script in each rank, and kill in the end those that are left: torchrun would end one when another does.

    Yields:
        A `Popen` of each rank, whose errors go to the file `{rank}.err` in `folder`.
    """
    ranks = []
    try:
        for of_rank in ranks_environment(world_size):
            environment = {**os.environ, **ONE_THREAD, **of_rank}
            with (folder / f"{of_rank['RANK']}.err").open("w") as err:
                line = [sys.executable, *command]
                ranks.append(subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=err))
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()
