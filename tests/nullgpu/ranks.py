"""This module lets a process on the null device believe that it is the first of many ranks."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ccmim_fast.ranks.session import Session

NODE = 8  # GPUs


@contextlib.contextmanager
def rank_0_of(gpus: int) -> Iterator[Session]:
    """Open a session as rank 0 of so many, over a NCCL that sends nothing; one GPU is alone, as in a run."""
    device = torch.device("cuda", 0)
    if gpus == 1:
        yield Session(0, 1, device)
        return
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(gpus), "LOCAL_WORLD_SIZE": str(min(gpus, NODE))}
    os.environ.update(told)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=gpus, device_id=device)
    try:
        yield Session(0, gpus, device)
    finally:
        dist.destroy_process_group()
        for name in told:
            del os.environ[name]
