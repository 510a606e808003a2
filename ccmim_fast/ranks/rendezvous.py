"""Rendezvous: the ranks of one launch find each other, whatever earlier launches of the same run left in the store.

torchrun's agent serves one store to all its launches. Addresses that killed ranks wrote into it are found by their
successors, which then wait for dead processes (pytorch/pytorch#135712). The agent's restart count does not tell
launches apart, because each machine's agent has its own. So the ranks agree on an id that no earlier launch had.
"""

import datetime
import time
import uuid
from collections.abc import Callable

from torch.distributed import Store

_POLL = 0.05  # seconds


def agree_on_launch(store: Store, rank: int, world_size: int, timeout: datetime.timedelta) -> str:
    """Return an id that rank 0 makes and all ranks of its launch get; raises TimeoutError if some rank does not come.

    Each rank writes a new token and waits for the reply to this token, which no earlier launch can have given. Rank 0
    replies to every token it finds with its id, until each rank has confirmed the id.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    token = uuid.uuid4().hex
    if rank:
        store.set(f"ccmim/token/{rank}", token)
        _wait_until(lambda: store.check([f"ccmim/reply/{token}"]), deadline, "rank 0")
        launch = store.get(f"ccmim/reply/{token}").decode()
        store.set(f"ccmim/{launch}/{rank}", "joined")
        return launch
    missing = set(range(1, world_size))

    def all_joined() -> bool:
        for other in sorted(missing):
            if store.check([f"ccmim/{token}/{other}"]):
                missing.remove(other)
            elif store.check([f"ccmim/token/{other}"]):
                store.set(f"ccmim/reply/{store.get(f'ccmim/token/{other}').decode()}", token)
        return not missing

    _wait_until(all_joined, deadline, f"ranks of 1..{world_size - 1}")
    return token


def _wait_until(condition: Callable[[], bool], deadline: float, expected: str) -> None:
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{expected} did not come in time")
        time.sleep(_POLL)
