"""Where the ranks of one launch find each other, whatever earlier launches of the same run left there.

torchrun's agent serves one store to all its launches, and the addresses that killed ranks wrote into it are found by
their successors, who then wait for the dead (pytorch/pytorch#135712). Its count of launches does not tell them apart:
each machine's agent has one of its own. So the ranks agree on a name that no earlier launch had.
"""

import datetime
import time
import uuid
from collections.abc import Callable

from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_POLL = 0.05  # seconds


def meet(timeout: datetime.timedelta) -> tuple[Store, int, int, str]:
    """The store of this launch alone, rank and world size, as the environment tells, and the launch's name.

    Raises:
        TimeoutError: some rank did not come.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    name = common_name(store, rank, world_size, timeout)
    return PrefixStore(name, store), rank, world_size, name


def common_name(store: Store, rank: int, world_size: int, timeout: datetime.timedelta) -> str:
    """A name that rank 0 makes and all ranks of its launch get; those of dead ones may lie about in the store.

    Each rank writes a new word of its own and waits for the answer to this word, which no earlier launch can have
    given. Rank 0 answers every word it finds with its name, until each rank has confirmed the name.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    word = uuid.uuid4().hex
    if rank:
        store.set(f"ccmim/word/{rank}", word)
        _wait_until(lambda: store.check([f"ccmim/answer/{word}"]), deadline, "rank 0")
        name = store.get(f"ccmim/answer/{word}").decode()
        store.set(f"ccmim/{name}/{rank}", "here")
        return name
    missing = set(range(1, world_size))

    def all_here() -> bool:
        for other in sorted(missing):
            if store.check([f"ccmim/{word}/{other}"]):
                missing.remove(other)
            elif store.check([f"ccmim/word/{other}"]):
                store.set(f"ccmim/answer/{store.get(f'ccmim/word/{other}').decode()}", word)
        return not missing

    _wait_until(all_here, deadline, f"ranks of 1..{world_size - 1}")
    return word


def _wait_until(happened: Callable[[], bool], deadline: float, who: str) -> None:
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{who} did not come in time")
        time.sleep(_POLL)
