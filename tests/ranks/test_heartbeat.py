"""The heartbeats of all ranks show which rank the others wait for, and the report says so."""

import os
import socket
import time

import pytest

from ccmim_fast.ranks.heartbeat import (
    DONE,
    Heartbeat,
    diagnose,
    headline,
    ranges,
    read_heartbeats,
    report,
    write_heartbeat,
)
from ccmim_fast.runs.state import process_start

NOW = 1_800_000_000.0
OTHER = "node-b"  # a machine whose processes nobody here can see


def beat(rank, step=8, phase="in step", host=OTHER, pid=100, began=NOW - 60, written=NOW - 1, **rest):
    return Heartbeat("launch", rank, host, pid, 1, step, phase, began, written, **rest)


def diagnosed(*beats):
    found = diagnose(beats, NOW, silence=20)
    return found.reason, found.ranks, headline(beats, found)


def at(seconds):
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def test_a_rank_that_waits_for_images_is_behind_those_in_the_next_step():
    reason, ranks, line = diagnosed(beat(0), beat(1, 7, "waiting for images"), beat(2), beat(3))
    assert (reason, ranks) == ("behind", [1])
    assert line == (
        f"rank 1 (node-b, process 100) is stuck: waiting for images after step 7 since {at(NOW - 60)}; "
        "ranks 0, 2-3 wait for it"
    )


def test_a_rank_that_saves_is_behind_those_that_have_saved():
    assert diagnosed(beat(0, 7, "saving"), beat(1, 7, "waiting for images"))[:2] == ("behind", [0])
    assert diagnosed(beat(0, 0, "indexing images"), beat(1, 0, "waiting for the index"))[:2] == ("behind", [0])


def test_a_silent_rank_is_worse_than_one_that_is_behind():
    reason, ranks, line = diagnosed(beat(0, written=NOW - 21), beat(1, 7, "waiting for images"))
    assert (reason, ranks) == ("silent", [0])
    assert line == (
        f"rank 0 (node-b, process 100) is silent; last heartbeat: in step 8 at {at(NOW - 21)}; rank 1 waits for it"
    )
    assert diagnosed(beat(0), None)[1:] == ([1], "rank 1 has written no heartbeat yet; rank 0 waits for it")


def test_a_missing_process_has_died_and_one_that_wrote_its_error_has_failed():
    mine = {"host": socket.gethostname(), "pid": os.getpid()}
    reason, ranks, line = diagnosed(beat(0), beat(1, **mine), beat(2, written=NOW - 99))
    assert (reason, ranks) == ("died", [1])
    assert f"process {os.getpid()}) died without an error message, perhaps killed; last heartbeat: in step 8" in line
    failed = beat(2, outcome="DataError: a.jpg")
    assert diagnosed(beat(0), beat(1, **mine), failed) == (
        *("failed", [2]),
        "rank 2 (node-b, process 100) failed, in step 8: DataError: a.jpg",
    )
    # This very process is alive.
    alive = beat(0, **mine)._replace(started=process_start(os.getpid()))
    assert not alive.has_died
    assert alive._replace(started=alive.started - 1).has_died
    assert not alive._replace(started=alive.started - 1, host=OTHER).has_died


def test_ranks_that_are_done_are_not_missed():
    assert diagnosed(beat(0, outcome=DONE, written=NOW - 99), beat(1))[0] == "level"
    assert diagnosed(beat(0), beat(1))[2] == "no rank is behind the others: all are in step 8"


def test_the_report_has_the_activity_of_every_rank():
    beats = [beat(0, began=NOW - 59), beat(1, 7, "waiting for images"), beat(2), None]
    text = report(beats, diagnose(beats[:3], NOW, 20), {1: "  MainThread:\n    a.py:3 read: open(path)\n"})
    first, _, _, *lines = text.splitlines()
    assert first.startswith("rank 1 (node-b")
    assert lines == [
        f"  ranks 0, 2: in step 8, since {at(NOW - 60)} to {at(NOW - 59)}",
        f"  rank 1: waiting for images after step 7, since {at(NOW - 60)}",
        "  rank 3: no heartbeat",
        "",
        "stack of rank 1:",
        "  MainThread:",
        "    a.py:3 read: open(path)",
    ]


def test_without_a_rank_behind_the_stack_of_the_fewest_ranks_comes_first():
    waits, hangs = "  MainThread:\n    a.py:1 all_reduce", "  MainThread:\n    b.py:2 read"
    beats = [beat(rank) for rank in range(4)]
    text = report(beats, diagnose(beats, NOW, 20), {0: waits, 1: waits, 2: hangs, 3: waits})
    assert text.endswith(f"\n\nstack of rank 2:\n{hangs}\n\nstack of ranks 0-1, 3:\n{waits}\n")


def test_files_of_other_launches_and_damaged_ones_are_ignored(tmp_path):
    for rank, text in enumerate(["{", "[]", '{"launch": "launch"}']):
        (tmp_path / f"rank_{rank}.json").write_text(text)
    write_heartbeat(tmp_path, beat(3))
    write_heartbeat(tmp_path, beat(4)._replace(launch="before"))
    assert read_heartbeats(tmp_path, "launch", range(6)) == [None, None, None, beat(3), None, None]
    write_heartbeat(tmp_path / "nowhere", beat(3))


@pytest.mark.parametrize(("ranks", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")])
def test_ranges(ranks, text):
    assert ranges(ranks) == text
