"""What other processes prepare is in order, no further ahead than one a process, and ends with its own error."""

import pytest
import torch

from ccmim_fast.errors import MachineError
from ccmim_fast.evaluation import loader
from ccmim_fast.evaluation.loader import prepared, shared_memory_is_small

CPU = torch.device("cpu")


def tens(key):
    """Return ten times as much; 7 is an error of the user's, 8 one of ours."""
    if key == 7:
        raise MachineError("seven: too many")
    if key == 8:
        raise ZeroDivisionError("eight")
    return 10 * key


def pairs(asked=None):
    for first in range(0, 20, 2):
        if asked is not None:
            asked.append(first)
        yield [first, first + 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_come_in_order_until_one_fails(workers):
    batches = prepared(tens, pairs(), tuple, workers, CPU)
    assert [next(batches) for _ in range(3)] == [(0, 10), (20, 30), (40, 50)]
    with pytest.raises(MachineError, match=r"\Aseven: too many\Z"):
        next(batches)


def test_our_own_mistake_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError, match="in tens"):
        next(prepared(tens, [[8]], tuple, 2, CPU))


@pytest.mark.parametrize(("workers", "ahead"), [(1, 0), (2, 2)])
def test_one_batch_a_process_is_prepared_ahead(workers, ahead):
    asked = []
    batches = prepared(tens, pairs(asked), tuple, workers, CPU)
    for number in range(1, 4):
        next(batches)
        assert len(asked) == number + ahead


def whole(keys):
    return torch.tensor(keys), keys


@pytest.mark.parametrize("small", [False, True])
def test_tensors_need_no_shared_memory_where_there_is_little(monkeypatch, small):
    """A write beyond the end of /dev/shm, 64 MB in Docker, ends a process by a signal."""
    monkeypatch.setattr(loader, "_SHARED", 2**60 if small else 0)
    assert shared_memory_is_small() == small
    sent = []
    loads = loader.pickle.loads
    monkeypatch.setattr(loader.pickle, "loads", lambda data: sent.append(len(data)) or loads(data))
    found = list(prepared(tens, [[1, 2], [3]], whole, 2, CPU))
    assert [(numbers.tolist(), keys) for numbers, keys in found] == [([10, 20], [10, 20]), ([30], [30])]
    assert len(sent) == (2 if small else 0)
    with pytest.raises(MachineError, match=r"\Aseven: too many\Z"):
        next(prepared(tens, [[7]], whole, 2, CPU))
