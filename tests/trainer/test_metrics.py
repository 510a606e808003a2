"""Records of a run whose disk is full for a while (fault 10)."""

import collections
import errno
import os

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from ccmim_fast.trainer import metrics
from ccmim_fast.trainer.metrics import Metrics

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
