"""What other processes prepare is in order, no further ahead than one a process, and ends with its own error."""

import pytest
import torch

from ccmim_fast.errors import MachineError
from ccmim_fast.evaluation.loader import prepared

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
