"""One interface, three places: the same maps come back, whatever was written when."""

import os
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccmim_fast.bank import stores
from ccmim_fast.bank.stores import FileStore, HostStore, choose_store, open_store
from ccmim_fast.errors import ConfigError, MachineError

MAPS, CELLS = 20, 3
CPU = torch.device("cpu")


@pytest.fixture(params=["device", "host", "file"])
def store(request, device, tmp_path):
    return open_store(request.param, MAPS, CELLS, device, tmp_path / "scores.bin")


def maps_like(count, start=1.0):
    return (start + torch.arange(count * CELLS * CELLS)).view(count, CELLS, CELLS).to(torch.float16)


def test_all_maps_are_unseen_at_first(store):
    assert torch.equal(store.contents(), torch.zeros(MAPS, CELLS, CELLS, dtype=torch.float16))


def test_what_was_written_is_read(store, device):
    rows = np.array([4, 0, 19])
    store.write(rows, maps_like(3).to(device))
    found = store.read(np.array([19, 4, 5, 4]))
    assert found.device.type == device.type
    expected = torch.stack([maps_like(3)[2], maps_like(3)[0], torch.zeros(CELLS, CELLS).half(), maps_like(3)[0]])
    assert torch.equal(found.cpu(), expected)


def test_filled_it_holds_that_and_nothing_of_before(store, device):
    store.write(np.array([1]), maps_like(1, 500.0).to(device))
    store.fill(maps_like(MAPS))
    assert torch.equal(store.contents(), maps_like(MAPS))
    assert torch.equal(store.read(np.array([1])).cpu(), maps_like(MAPS)[1:2])


def test_what_is_read_is_a_copy(store, device):
    rows = np.array([2, 3])
    store.read(rows).fill_(7)
    assert not store.contents().any()
    given_maps = maps_like(2).to(device)
    store.write(rows, given_maps)
    given_maps.fill_(0)
    assert torch.equal(store.read(rows).cpu(), maps_like(2))


def test_to_prefetch_changes_nothing(store, device):
    store.write(np.arange(MAPS), maps_like(MAPS).to(device))
    store.prefetch(np.array([0, 7, 19]))
    assert torch.equal(store.contents(), maps_like(MAPS))


class SlowEvent:
    """A copy that takes until somebody waits for it, or until `arrive` says so."""

    arrived: ClassVar[set[int]] = set()

    def __init__(self, number):
        self.number, self.waited = number, 0

    def query(self):
        return self.number in self.arrived

    def synchronize(self):
        self.waited += 1


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_maps_on_their_way_count_as_written(data):
    """Copies from a GPU arrive at any time; a read returns what was written last."""
    store, expected = HostStore(torch.zeros(MAPS, CELLS, CELLS, dtype=torch.float16), CPU), np.zeros(MAPS)
    SlowEvent.arrived = set()
    for turn in range(data.draw(st.integers(1, 12))):
        rows = np.array(data.draw(st.lists(st.integers(0, MAPS - 1), min_size=1, max_size=4, unique=True)))
        if data.draw(st.booleans()):
            event = SlowEvent(turn)
            maps = torch.full((len(rows), CELLS, CELLS), turn + 1.0, dtype=torch.float16)
            store._writes.append(stores._Write(rows, maps, event))
            expected[rows] = turn + 1
        else:
            SlowEvent.arrived |= set(data.draw(st.lists(st.integers(0, 12))))
            found = store.read(rows)
            assert found[:, 0, 0].tolist() == expected[rows].tolist()
    assert store.contents()[:, 0, 0].tolist() == expected.tolist()
    assert not store._writes


def test_nobody_waits_for_rows_that_nobody_asks_for():
    store = HostStore(torch.zeros(MAPS, CELLS, CELLS, dtype=torch.float16), CPU)
    SlowEvent.arrived, event = set(), SlowEvent(0)
    store._writes.append(stores._Write(np.array([3]), maps_like(1), event))
    store.read(np.array([4, 5]))
    assert event.waited == 0
    store.read(np.array([5, 3]))
    assert event.waited == 1


def test_a_file_is_reserved_and_made_anew(tmp_path):
    path = tmp_path / "run" / "scores.bin"
    FileStore(path, MAPS, CELLS, CPU).write(np.array([0]), maps_like(1))
    assert path.stat().st_size == MAPS * CELLS * CELLS * 2
    assert path.stat().st_blocks * 512 >= path.stat().st_size
    assert not FileStore(path, MAPS, CELLS, CPU).contents().any()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(stores.os, "posix_fallocate", full)
    path = tmp_path / "scores.bin"
    with pytest.raises(MachineError, match=r"scores.bin: no room for 51.2 GB of score maps: No space left on device"):
        FileStore(path, 100_000_000, 16, CPU)
    assert not path.exists()


@pytest.mark.parametrize(
    ("maps", "expected"), [(1_281_167, "device"), (3_906_250, "device"), (3_906_251, "host"), (31_250_001, "file")]
)
def test_auto_takes_the_first_that_has_room(maps, expected):
    """656 MB of ImageNet on a GPU; 2 GB are 3,906,250 maps of 512 bytes."""
    assert choose_store("auto", maps, 16, device_gb=2.0, host_gb=16.0) == expected


def test_a_named_store_that_is_too_small_is_refused():
    with pytest.raises(
        ConfigError, match=r"score.store=host: 100000000 maps of 16 x 16 take 51.2 GB, score.host_gb=16"
    ):
        choose_store("host", 100_000_000, 16, 2.0, 16.0)
    assert choose_store("file", 100_000_000, 16, 2.0, 16.0) == "file"
