"""Ranks find each other although dead ones left keys in the store."""

import contextlib
import datetime
import threading
import time

import pytest
import torch
from torch.distributed import HashStore

from ccmim_fast.errors import MachineError
from ccmim_fast.ranks import session as sessions
from ccmim_fast.ranks.rendezvous import agree_on_launch
from ccmim_fast.ranks.session import Session, main_first

SOON = datetime.timedelta(seconds=20)


def launch(store, world_size, late=()):
    """Return the ids that the ranks of one launch get; those of `late` come a moment after the others."""
    ids = {}

    def come(rank):
        if rank in late:
            time.sleep(0.3)
        ids[rank] = agree_on_launch(store, rank, world_size, SOON)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ids


@pytest.mark.parametrize("late", [(), (0,), (2,), (1, 2)])
def test_all_ranks_get_one_id_and_each_launch_another(late):
    store, seen = HashStore(), set()
    for _ in range(3):
        ids = launch(store, 3, late)
        assert len(ids) == 3
        assert len(set(ids.values())) == 1
        seen |= set(ids.values())
    assert len(seen) == 3


def test_keys_of_a_launch_that_broke_off_are_ignored():
    """One time rank 1 wrote its token and died, another time rank 0 replied and died."""
    store = HashStore()
    with pytest.raises(TimeoutError, match="rank 0 did not come"):
        agree_on_launch(store, 1, 2, datetime.timedelta(seconds=0.2))
    with pytest.raises(TimeoutError, match=r"ranks of 1\.\.1 did not come"):
        agree_on_launch(store, 0, 2, datetime.timedelta(seconds=0.2))
    ids = launch(store, 2, late=(1,))
    assert ids[0] == ids[1]


def test_one_rank_waits_for_nobody():
    assert agree_on_launch(HashStore(), 0, 1, SOON)


@pytest.mark.parametrize(("rank", "local", "turn"), [(0, "0", 0), (1, "1", 2), (2, "0", 1), (3, "1", 2)])
def test_rank_0_then_the_first_of_each_machine_then_all(monkeypatch, rank, local, turn):
    """Two machines with two ranks each; all come to as many barriers, whatever is raised between them."""
    barriers = []
    monkeypatch.setattr(sessions, "barrier", lambda: barriers.append(None))
    monkeypatch.setenv("LOCAL_RANK", local)
    with contextlib.suppress(ValueError), main_first(Session(rank, 4, torch.device("cpu"))):
        before = len(barriers)
        raise ValueError("index")
    assert (before, len(barriers)) == (turn, 2)


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"RANK": "0"}, "RANK=0 without WORLD_SIZE and MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK and"),
        ({**LAUNCHED, "MASTER_ADDR": None}, "RANK=1, WORLD_SIZE=2, MASTER_PORT=29500 without MASTER_ADDR: launch with"),
        ({**LAUNCHED, "RANK": "one"}, "RANK='one' must be a whole number"),
        ({**LAUNCHED, "RANK": "2"}, "RANK=2 must be less than WORLD_SIZE=2"),
        ({**LAUNCHED, "RANK": "-1"}, "RANK='-1' must be a whole number"),
        ({**LAUNCHED, "WORLD_SIZE": ""}, "WORLD_SIZE='' must be a whole number"),
        ({**LAUNCHED, "MASTER_PORT": "tcp://x"}, "MASTER_PORT='tcp://x' must be a whole number"),
        ({**LAUNCHED, "LOCAL_RANK": "x"}, "LOCAL_RANK='x' must be a whole number"),
    ],
)
def test_half_of_a_launch_is_one_line(monkeypatch, given, words):
    for name in (*LAUNCHED, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(MachineError, match=words), sessions.open_session("cpu"):
        pass


def test_no_launch_is_one_process(monkeypatch):
    for name in (*LAUNCHED, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")  # left over from another program
    with sessions.open_session("cpu") as here:
        assert (here.rank, here.world_size) == (0, 1)
