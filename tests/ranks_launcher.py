"""All ways in which tests launch ranks: a function in the processes of a group, or a command under torchrun."""

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

FAULTY = str(Path(__file__).parent / "faulty.py")
PATIENCE = 300  # seconds, for a machine with much to do
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def run_in_ranks(target, world_size, folder, *arguments):
    """Run `target(rank, world_size, *arguments)` in the spawned processes of a gloo group; all must end with code 0."""
    spawn = multiprocessing.get_context("spawn")
    places = [(target, rank, world_size, f"{folder}/rendezvous") for rank in range(world_size)]
    processes = [spawn.Process(target=_rank, args=(*place, *arguments)) for place in places]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * world_size


def _rank(target, rank, world_size, rendezvous, *arguments):
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    target(rank, world_size, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def torchrun(world_size, *command, fails=False, **environment):
    """Run a script (or `-m` and a module) with its arguments to the end; one rank runs without torchrun.

    Args:
        fails: the exit code must not be 0; else it must be 0.
        environment: more variables.

    Returns:
        The `CompletedProcess`, with output and errors as text.
    """
    launcher = torchrun_command("--standalone", f"--nproc-per-node={world_size}")
    line = [*(launcher if world_size > 1 else [sys.executable]), *command]
    environment = {**os.environ, **ONE_THREAD, **environment}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done


def torchrun_command(*options):
    return [sys.executable, "-m", "torch.distributed.run", *options]


@contextlib.contextmanager
def ranks_without_torchrun(world_size, folder, *command):
    """Start a script in each rank, and kill in the end those that are left: torchrun would end one when another does.

    Yields:
        A `Popen` of each rank, whose errors go to the file `{rank}.err` in `folder`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    sizes, ranks = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}, []
    try:
        for rank in map(str, range(world_size)):
            environment = {**os.environ, **ONE_THREAD, **address, **sizes, "RANK": rank, "LOCAL_RANK": rank}
            with (folder / f"{rank}.err").open("w") as err:
                line = [sys.executable, *command]
                ranks.append(subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=err))
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()
