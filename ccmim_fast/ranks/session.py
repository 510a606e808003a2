"""A session: this process as one rank of many or alone, with its device, from torchrun's environment."""

import contextlib
import datetime
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ccmim_fast.errors import MachineError, one_line
from ccmim_fast.ranks.rendezvous import agree_on_launch
from ccmim_fast.ranks.watchdog import Watchdog

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets all
_LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MARGIN = 1.0  # minutes that the backend waits beyond `watch.timeout`: the watchdog, which knows more, ends first


class Session(NamedTuple):
    """This process is rank `rank` of `world_size` and computes on `device`; `watchdog` is told its phases."""

    rank: int
    world_size: int
    device: torch.device
    watchdog: Watchdog = Watchdog()

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def open_session(device: str, timeout: float = 30.0) -> Iterator[Session]:
    """Join the process group that torchrun announces (NCCL on CUDA, gloo on CPU), or run alone.

    Args:
        device: `auto`, `cpu` or `cuda`; auto takes CUDA where there is a GPU.
        timeout: minutes that a rank waits for another.

    Raises MachineError: no GPU for `cuda`; the ranks do not find each other; in the body, when another rank is lost.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("train.device=cuda: no CUDA device is visible; use train.device=cpu")
    kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    if not is_launched():
        yield Session(0, 1, torch.device(kind))
        return
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda" and local_rank >= (count := torch.cuda.device_count()):
        raise MachineError(f"LOCAL_RANK={local_rank}: this machine shows {count} GPUs; launch as many ranks on it")
    gpu = torch.device(kind, local_rank) if kind == "cuda" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    # Each rank compiles for itself: two that wrote one cache at a time have broken it.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / f"cache_rank_{os.environ['RANK']}"))
    try:
        wait = datetime.timedelta(minutes=timeout)
        store, rank, world_size = next(rendezvous("env://", timeout=wait))
        launch = agree_on_launch(store, rank, world_size, wait)
        store = dist.PrefixStore(launch, store)  # of this launch alone
        place = {"store": store, "rank": rank, "world_size": world_size, "device_id": gpu}
        dist.init_process_group("gloo" if gpu is None else "nccl", timeout=backend_timeout(timeout), **place)
    except (TimeoutError, dist.DistError) as error:
        address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        line = f"rank {os.environ['RANK']} does not find the other ranks at {address}: {one_line(error)}"
        raise MachineError(line) from error
    first = rank - local_rank  # torchrun numbers the ranks of a machine consecutively
    local_ranks = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    watchdog = Watchdog(rank, world_size, launch, 60 * timeout, local_ranks)
    try:
        with watchdog:
            yield Session(rank, world_size, gpu or torch.device(kind), watchdog)
            dist.barrier()
            watchdog.finish()
    finally:
        dist.destroy_process_group()


def is_launched() -> bool:
    """Return whether this process is one of those that torchrun or the like launched, by its environment.

    Raises MachineError where the environment tells half of it, or what cannot be.
    """
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return False
    way = "launch with torchrun, or unset RANK and WORLD_SIZE to run alone"
    if missing := [name for name in _LAUNCHED if name not in os.environ]:
        given = ", ".join(f"{name}={os.environ[name]}" for name in _LAUNCHED if name in os.environ)
        raise MachineError(f"{given:.200} without {' and '.join(missing)}: {way}")
    numbers = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", *_LOCAL) if name in os.environ}
    for name, text in numbers.items():
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise MachineError(f"{name}={text!r:.80} must be a whole number; {way}")
    rank, world_size = int(numbers["RANK"]), int(numbers["WORLD_SIZE"])
    if rank >= world_size:
        raise MachineError(f"RANK={rank} must be less than WORLD_SIZE={world_size}; {way}")
    return True


def backend_timeout(timeout: float) -> datetime.timedelta:
    """Return the time-out of a process group whose ranks wait `timeout` minutes for each other."""
    return datetime.timedelta(minutes=timeout + _MARGIN)


@contextlib.contextmanager
def main_first(session: Session) -> Iterator[None]:
    """Run the body on rank 0 before the other ranks: it writes a file that the others then find.

    The first rank of each other machine, where that file may be missing, comes second, and all others come last.
    """
    turn = 0 if session.is_main else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    session.watchdog.enter_phase("waiting for the index")
    for _ in range(turn):
        barrier()
    session.watchdog.enter_phase("indexing images")
    try:
        yield
    finally:
        session.watchdog.enter_phase("building the model")
        for _ in range(turn, 2):
            barrier()


def broadcast(value: Any) -> Any:
    """Return the first rank's value, any picklable one, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def gather_values(value: Any) -> list[Any]:
    """Return the value of each rank, any picklable ones, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Return when every rank has called this."""
    if dist.is_initialized():
        dist.barrier()


def node_count() -> int:
    """Return how many machines train together; 1 without torchrun, or where they have unequal numbers of ranks."""
    world, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return world // local if world % local == 0 else 1


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Replace each value by the largest of all ranks, in place; return the tensor."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Replace each value by its mean over ranks, in place; return the tensor."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def gather_ranks(value: torch.Tensor) -> torch.Tensor:
    """Return the value of each rank, [R, ...], on the device of this rank's; it has one shape everywhere."""
    if not dist.is_initialized():
        return value[None]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else value.device
    values = [torch.empty_like(value, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.to(device).contiguous())
    return torch.stack(values).to(value.device)
