"""Ranks that find each other among what dead ones left in the store."""

import contextlib
import datetime
import threading
import time

import pytest
import torch
from torch.distributed import HashStore

from ccmim_fast.ranks import session as distributed
from ccmim_fast.ranks.rendezvous import common_name
from ccmim_fast.ranks.session import Session, main_first

SOON = datetime.timedelta(seconds=20)


def launch(store, world_size, late=()):
    """The names that the ranks of one launch get; those of `late` come a moment after the others."""
    names = {}

    def come(rank):
        if rank in late:
            time.sleep(0.3)
        names[rank] = common_name(store, rank, world_size, SOON)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


@pytest.mark.parametrize("late", [(), (0,), (2,), (1, 2)])
def test_all_ranks_get_one_name_and_each_launch_another(late):
    store, seen = HashStore(), set()
    for _ in range(3):
        names = launch(store, 3, late)
        assert len(names) == 3
        assert len(set(names.values())) == 1
        seen |= set(names.values())
    assert len(seen) == 3


def test_what_a_launch_left_that_broke_off_does_not_count():
    """Its rank 1 wrote its word and died; and another time its rank 0 answered and died."""
    store = HashStore()
    with pytest.raises(TimeoutError, match="rank 0 did not come"):
        common_name(store, 1, 2, datetime.timedelta(seconds=0.2))
    with pytest.raises(TimeoutError, match=r"ranks of 1\.\.1 did not come"):
        common_name(store, 0, 2, datetime.timedelta(seconds=0.2))
    names = launch(store, 2, late=(1,))
    assert names[0] == names[1]


def test_one_rank_waits_for_nobody():
    assert common_name(HashStore(), 0, 1, SOON)


@pytest.mark.parametrize(("rank", "local", "turn"), [(0, "0", 0), (1, "1", 2), (2, "0", 1), (3, "1", 2)])
def test_rank_0_then_the_first_of_each_machine_then_all(monkeypatch, rank, local, turn):
    """Two machines with two ranks each; all come to as many barriers, whatever is raised between them."""
    barriers = []
    monkeypatch.setattr(distributed, "wait_for_all", lambda: barriers.append(None))
    monkeypatch.setenv("LOCAL_RANK", local)
    with contextlib.suppress(ValueError), main_first(Session(rank, 4, torch.device("cpu"))):
        before = len(barriers)
        raise ValueError("index")
    assert (before, len(barriers)) == (turn, 2)
