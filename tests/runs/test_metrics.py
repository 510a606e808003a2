"""Records of a run whose disk is full for a while (fault 10)."""

import collections
import errno
import gc
import os
import time
import weakref

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from ccmim_fast.runs import metrics
from ccmim_fast.runs.metrics import Metrics

Usage = collections.namedtuple("Usage", "total used free")


def test_tensorboard_goes_on_when_there_is_room_again(tmp_path, monkeypatch):
    free, write = [10**9], RecordWriter.write

    def limited(self, data):
        if not free[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", limited)
    monkeypatch.setattr(metrics.shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - free[0], free[0]))
    written = Metrics(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        free[0] = 0 if step == 2 else 10**9
        written.write("train", step, loss=1.0 / step)
        written._board.flush()  # while it is so
    written.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_failed_tensorboard_holds_on_to_no_later_step(tmp_path, monkeypatch, capsys):
    """A disk that says it has room, as with a quota. Seen: 350 KB of a step's tensors for each record."""

    def full(self, data):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    class Step:
        pass

    def log(number):
        result = Step()
        written.write("train", number, loss=1.0)
        return weakref.ref(result)

    written = Metrics(tmp_path, tensorboard=True)
    written._board.flush()
    monkeypatch.setattr(RecordWriter, "write", full)
    steps = []
    for number in range(5):
        steps.append(log(number))
        time.sleep(0.1)  # so that the thread fails
    gc.collect()
    assert sum(step() is not None for step in steps) <= 1  # that in which it failed
    assert capsys.readouterr().err.count("TensorBoard is off, metrics.jsonl goes on: OSError: [Errno 122]") == 1
    written.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
