"""The search for the largest micro-batch, on made limits."""

import dataclasses

import pytest
import torch
from tiny import TINY

from ccmim_fast.engine.find_batch import largest, with_largest_batch
from ccmim_fast.errors import MachineError
from ccmim_fast.ranks.session import Session

CPU = Session(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("limit", [2, 3, 64, 100, 1024])
def test_finds_every_answer_in_few_trials(limit):
    for most in range(limit + 10):
        tried = []

        def fits(batch, most=most, tried=tried):
            tried.append(batch)
            return batch <= most

        expected = 0 if most < 2 else min(most, limit)
        assert largest(fits, limit) == expected
        assert len(tried) == len(set(tried))
        assert len(tried) <= 2 * limit.bit_length()
        assert all(2 <= batch <= limit for batch in tried)


@pytest.mark.parametrize(("most", "accumulate"), [(1000, 1), (96, 1), (95, 2), (48, 2), (40, 3), (17, 6), (2, 48)])
def test_accumulates_as_little_as_fits(most, accumulate, capsys):
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, batch_size=96))
    found = with_largest_batch(config, CPU, lambda batch: batch <= most)
    assert found.train.accumulate == accumulate
    said = capsys.readouterr().out
    assert said.startswith(f"largest micro-batch that fits: {min(most, 96)} images")
    assert f"train.accumulate={accumulate}, {96 // accumulate} images each" in said


def test_nothing_fits():
    with pytest.raises(MachineError, match=r"2 images do not fit cpu; try train\.recompute=true"):
        with_largest_batch(TINY, CPU, lambda batch: False)


@pytest.mark.gpu
def test_on_a_gpu_of_little_memory():
    device = torch.device("cuda")
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, batch_size=2**14, compile="off"))
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(2**30 / total, device)
    try:
        found = with_largest_batch(config, Session(0, 1, device))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert 1 < found.train.accumulate < 2**13
