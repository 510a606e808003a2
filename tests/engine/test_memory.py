"""How many images fit: the search for the largest micro-batch, and advice that fits where memory ran out (fault 17).

The GPU's memory is made; its law is linear.
"""

import dataclasses
import re

import pytest
import torch
from tiny import TINY, tiny_config

from ccmim_fast.engine.memory import extrapolated, largest, with_largest_batch
from ccmim_fast.engine.pretraining import fit
from ccmim_fast.engine.step import TrainStep
from ccmim_fast.errors import ConfigError, MachineError
from ccmim_fast.ranks.session import Session
from ccmim_fast.runs.state import read_state

CPU = Session(0, 1, torch.device("cpu"))
WEIGHTS, IMAGE, TOTAL = 10**9, 10**8, 2 * 10**9  # bytes; ten images fit


class Card:
    """A GPU of which a step takes WEIGHTS and IMAGE for each of a micro-batch; the step itself runs on the CPU.

    Attributes:
        tried: micro-batches, in order.
    """

    def __init__(self, monkeypatch, total=TOTAL):
        self.total, self.peak, self.tried = total, 0, []
        self._run = TrainStep.run
        monkeypatch.setattr(TrainStep, "run", lambda step, batches: self.run(step, batches))
        for name, value in (
            ("mem_get_info", lambda device: (self.total - 3 * 10**8, self.total)),
            ("memory_reserved", lambda device: 3 * 10**8),
            ("max_memory_allocated", lambda device: self.peak),
            ("reset_peak_memory_stats", lambda device: setattr(self, "peak", 0)),
            ("empty_cache", lambda: None),
        ):
            monkeypatch.setattr(torch.cuda, name, value)

    def run(self, step, batches):
        images = len(batches[0].images_BHWC)
        self.tried.append(images)
        need = WEIGHTS + IMAGE * images
        if need > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")
        self.peak = max(self.peak, need)
        return self._run(step, batches)


@pytest.fixture(autouse=True)
def no_counting(monkeypatch):
    """The FLOP counter takes a step of its own before the run."""
    monkeypatch.setattr("ccmim_fast.engine.pretraining.count_flops", lambda step: {})


def config_for(tmp_path, **train):
    return tiny_config(
        run={"dir": str(tmp_path / "run"), "overwrite": True, "log_every": 1, "tensorboard": False},
        data={"source": "shapes", "samples": 48, "root": str(tmp_path / "shapes"), "loader": "torch"},
        train={"epochs": 1, "batch_size": 24, "max_steps": 1, "device": "cpu", "precision": "fp32", **train},
    )


def test_the_accumulation_that_is_named_fits_and_less_does_not(tmp_path, monkeypatch):
    card = Card(monkeypatch)
    with pytest.raises(MachineError) as caught:
        fit(config_for(tmp_path))
    line = str(caught.value)
    assert line == (
        "out of memory: a micro-batch of 24 images does not fit cpu (2.0 GB); 10 should, measured on smaller ones: "
        "set train.accumulate=3 (8 images each) or train.batch_size=10"
    )
    # Once the run itself, then the two that are measured: no loop of retries.
    assert card.tried == [24, 2, 2, 4, 4]
    state = read_state(tmp_path / "run")
    assert (state.state, state.exit_code, state.error) == ("failed", 6, line)
    fit(config_for(tmp_path, accumulate=3))
    fit(config_for(tmp_path, batch_size=10))
    for more in ({"accumulate": 2}, {"batch_size": 11}):
        with pytest.raises(MachineError):
            fit(config_for(tmp_path, **more))


def test_the_warm_up_is_told_alike(tmp_path, monkeypatch):
    """Before the first step, where nothing has been recorded yet."""
    Card(monkeypatch)
    with pytest.raises(MachineError, match=r"24 images does not fit .*; 10 should"):
        fit(config_for(tmp_path, compile="blocks"))


def test_maps_on_the_device_are_left_room_for(tmp_path, monkeypatch):
    Card(monkeypatch)
    config = dataclasses.replace(
        config_for(tmp_path), score=dataclasses.replace(tiny_config().score, source="bank", device_gb=0.25)
    )
    with pytest.raises(MachineError, match=r"; 7 should, .*accumulate=4 \(6 images each\)"):
        fit(config)


def test_a_batch_without_divisors_is_given_another(tmp_path, monkeypatch):
    Card(monkeypatch)
    with pytest.raises(MachineError, match=r"10 should, measured on smaller ones: set train\.batch_size=10$"):
        fit(config_for(tmp_path, batch_size=23))


def test_not_even_two_images(tmp_path, monkeypatch):
    Card(monkeypatch, total=WEIGHTS)
    with pytest.raises(MachineError, match=r"nor do 2; set train\.recompute=true, or take a smaller model\.arch$"):
        fit(config_for(tmp_path))


def test_what_failed_is_not_named(tmp_path, monkeypatch):
    """Where memory is in pieces there seems to be more of it."""
    Card(monkeypatch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * TOTAL, TOTAL))
    with pytest.raises(MachineError, match=r"; 23 should, .*accumulate=2 \(12 images each\) or train\.batch_size=23$"):
        fit(config_for(tmp_path))


def test_the_line_through_two_peaks():
    assert extrapolated(lambda batch: 100 + batch, 99) == 0
    assert extrapolated(lambda batch: 100 + batch, 102) == 2
    assert extrapolated(lambda batch: 100 + 7 * batch, 199) == 14
    assert extrapolated(lambda batch: 100, 199) == 0


def test_the_host_has_no_memory(tmp_path, monkeypatch):
    def greedy(step, batches):
        torch.empty(1 << 45)

    monkeypatch.setattr(TrainStep, "run", greedy)
    with pytest.raises(MachineError) as caught:
        fit(config_for(tmp_path))
    assert str(caught.value) == (
        "out of the host's memory, 140737.5 GB at once, with micro-batches of 24 images; "
        "try train.accumulate=2 (12 images each)"
    )
    assert read_state(tmp_path / "run").exit_code == 6
    with pytest.raises(MachineError, match=r"micro-batches of 3 images; try train\.recompute=true"):
        fit(config_for(tmp_path, batch_size=3))


def test_other_errors_are_what_they_were(tmp_path, monkeypatch):
    def wrong(step, batches):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(TrainStep, "run", wrong)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(config_for(tmp_path))


@pytest.mark.gpu
def test_on_a_gpu_of_little_memory(tmp_path, monkeypatch):
    """What is named fits."""
    device, limit = torch.device("cuda", 0), 2**31  # a limit of memory wants the number of its device
    total = torch.cuda.get_device_properties(device).total_memory
    config = config_for(tmp_path, device="cuda", batch_size=2**13)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, samples=2**13))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (limit - torch.cuda.memory_reserved(device), limit))
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    try:
        with pytest.raises(MachineError) as caught:
            fit(config)
        named = int(re.search(r"train\.accumulate=(\d+)", str(caught.value))[1])
        fit(dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=named)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


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
        assert tried[0] == 2  # while there is room for what the first step loads


@pytest.mark.parametrize(("most", "accumulate"), [(1000, 1), (96, 1), (95, 2), (48, 2), (40, 3), (17, 6), (2, 48)])
def test_accumulates_as_little_as_fits(most, accumulate, capsys):
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, batch_size=96))
    found = with_largest_batch(config, CPU, lambda batch: batch <= most)
    assert found.train.accumulate == accumulate
    said = capsys.readouterr().out
    assert said.startswith(f"largest micro-batch that fits: {min(most, 96)} images")
    assert f"train.accumulate={accumulate}, {96 // accumulate} images each" in said


def test_no_micro_batch_fits():
    with pytest.raises(MachineError, match=r"2 images do not fit cpu; try train\.recompute=true"):
        with_largest_batch(TINY, CPU, lambda batch: False)


def test_images_that_cannot_be_divided_into_what_fits():
    """One image each would be left, of which the heads' BatchNorm has no statistics."""
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, batch_size=3))
    with pytest.raises(ConfigError, match=r"train\.batch_size=3: must be 2 images per micro-batch at least"):
        with_largest_batch(config, CPU, lambda batch: batch <= 2)


@pytest.mark.gpu
def test_search_on_a_gpu_of_little_memory():
    device = torch.device("cuda", 0)
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, batch_size=2**14, compile="off"))
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(2**30 / total, device)
    try:
        found = with_largest_batch(config, Session(0, 1, device))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert 1 < found.train.accumulate < 2**13
