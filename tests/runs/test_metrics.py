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

from ccmim_fast.report.curves import read_metrics
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


def test_a_resumed_run_keeps_what_is_no_record_and_drops_what_comes_later(tmp_path):
    lines = [
        b'{"kind": "train", "step": 1}',
        b"\xff\xfe no text",
        b"[1, 2]",
        b'{"kind": "note"}',
        b"7",
        b"",
        b"[" * 9999,
    ]
    lines += [
        b'{"kind": "train", "step": 2}',
        b'{"kind": "train", "step": 3}',
        b'{"step": "4"}',
        b'{"kind": "train", "st',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    written = Metrics(tmp_path, tensorboard=False, resume_step=2)
    written.write("train", 3)
    written.close()
    kept = [*lines[:8], lines[9], b'{"kind": "train", "step": 3}', b""]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\n".join(kept)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_records_that_cannot_be_rewritten_stay(tmp_path, monkeypatch):
    """A disk that is full while a run goes on; a kill at that moment leaves the old file or the new one."""
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n')

    def full(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(metrics.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        Metrics(tmp_path, tensorboard=False, resume_step=1)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
