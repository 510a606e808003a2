"""One process or many: rank, world size and device, from torchrun's environment."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ccmim_fast.errors import MachineError
from ccmim_fast.ranks.rendezvous import meet
from ccmim_fast.ranks.watchdog import Watchdog

_LONGER = 1.0  # minutes that the backend waits beyond `watch.timeout`: the watchdog is to be first, which knows more


class Session(NamedTuple):
    """This process's place: `rank` of `world_size`, and its device; `watchdog` is told what it does."""

    rank: int
    world_size: int
    device: torch.device
    watchdog: Watchdog = Watchdog()

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def session(device: str, timeout: float = 30.0) -> Iterator[Session]:
    """Join the process group that torchrun announces (NCCL on CUDA, gloo on CPU), or run alone.

    Args:
        device: `auto`, `cpu` or `cuda`; auto takes CUDA where there is a GPU.
        timeout: minutes that a rank waits for another.

    Raises:
        MachineError: `cuda` without a GPU; the ranks do not find each other; within, when another rank is lost.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("train.device=cuda: no CUDA device is visible; use train.device=cpu")
    kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    if "WORLD_SIZE" not in os.environ:
        yield Session(0, 1, torch.device(kind))
        return
    local = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(local)
    # Each rank compiles for itself: two that write one cache at a time have broken it.
    os.environ.setdefault("TRITON_CACHE_DIR", _own_cache())
    backend, own = ("nccl", local) if kind == "cuda" else ("gloo", None)
    try:
        store, rank, world_size, launch = meet(datetime.timedelta(minutes=timeout))
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, device_id=own, timeout=backend_timeout(timeout)
        )
    except (TimeoutError, dist.DistError) as error:
        address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        line = " ".join(str(error).split())[:200]
        raise MachineError(f"rank {os.environ['RANK']} does not find the others at {address}: {line}") from error
    watchdog = Watchdog(rank, world_size, launch, 60 * timeout, _ranks_here(rank))
    try:
        with watchdog:
            yield Session(rank, world_size, local, watchdog)
            dist.barrier()
            watchdog.close()
    finally:
        dist.destroy_process_group()


def backend_timeout(timeout: float) -> datetime.timedelta:
    """Of a process group, where ranks wait for each other for `timeout` minutes."""
    return datetime.timedelta(minutes=timeout + _LONGER)


def _ranks_here(rank: int) -> range:
    """The ranks of this machine, as torchrun numbers them."""
    first = rank - int(os.environ.get("LOCAL_RANK", 0))
    return range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _own_cache() -> str:
    return str(Path.home() / ".triton" / f"cache_rank_{os.environ['RANK']}")


@contextlib.contextmanager
def main_first(here: Session) -> Iterator[None]:
    """What rank 0 does within is done before the others begin: it writes a file, they find it.

    Behind it comes the first rank of each other machine, where that file may not be, and then all others.
    """
    turn = 0 if here.is_main else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    here.watchdog.mark("waiting for the index")
    for _ in range(turn):
        wait_for_all()
    here.watchdog.mark("indexing images")
    try:
        yield
    finally:
        here.watchdog.mark("building the model")
        for _ in range(turn, 2):
            wait_for_all()


def from_main(value: Any) -> Any:
    """What the first rank has, on every rank; any picklable value."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def node_count() -> int:
    """Machines that train together, as torchrun tells; 1 without it, or where they have unequal numbers of ranks."""
    world, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return world // local if world % local == 0 else 1


def max_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The largest value of any rank, in place."""
    if dist.is_initialized():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
