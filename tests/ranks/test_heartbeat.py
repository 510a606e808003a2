"""From the last words of all ranks: which of them the others wait for, and how that is told."""

import os
import socket
import time

import pytest

from ccmim_fast.ranks.heartbeat import (
    DONE,
    Heartbeat,
    headline,
    heartbeat_of,
    ranges,
    read_heartbeats,
    report,
    what_is_wrong,
    write_heartbeat,
)

NOW = 1_800_000_000.0
OTHER = "node-b"  # of whose processes nobody here knows


def beat(rank, step=8, phase="in step", host=OTHER, pid=100, since=NOW - 60, told=NOW - 1, **rest):
    return Heartbeat("launch", rank, host, pid, 1, step, phase, since, told, **rest)


def wrong(*beats):
    found = what_is_wrong(beats, NOW, silence=20)
    return found.why, found.ranks, headline(beats, found)


def at(seconds):
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def test_who_waits_for_images_is_behind_those_in_the_next_step():
    why, ranks, line = wrong(beat(0), beat(1, 7, "waiting for images"), beat(2), beat(3))
    assert (why, ranks) == ("behind", [1])
    assert line == (
        f"rank 1 (node-b, process 100) stands still: waiting for images after step 7 since {at(NOW - 60)}; "
        "ranks 0, 2-3 wait for it"
    )


def test_who_saves_is_behind_those_that_have_saved():
    assert wrong(beat(0, 7, "saving"), beat(1, 7, "waiting for images"))[:2] == ("behind", [0])
    assert wrong(beat(0, 0, "indexing images"), beat(1, 0, "waiting for the index"))[:2] == ("behind", [0])


def test_a_silent_rank_is_worse_than_one_that_is_behind():
    why, ranks, line = wrong(beat(0, told=NOW - 21), beat(1, 7, "waiting for images"))
    assert (why, ranks) == ("silent", [0])
    assert line == (
        f"rank 0 (node-b, process 100) is silent: last heard of in step 8 at {at(NOW - 21)}; rank 1 waits for it"
    )
    assert wrong(beat(0), None)[1:] == ([1], "rank 1 has said nothing yet; rank 0 waits for it")


def test_a_process_that_is_not_there_is_gone_and_one_that_told_its_error_ended():
    mine = {"host": socket.gethostname(), "pid": os.getpid()}
    why, ranks, line = wrong(beat(0), beat(1, **mine), beat(2, told=NOW - 99))
    assert (why, ranks) == ("gone", [1])
    assert f"process {os.getpid()}) is gone without a word, perhaps killed: last heard of in step 8" in line
    ended = beat(2, end="DataError: a.jpg")
    assert wrong(beat(0), beat(1, **mine), ended) == (
        *("ended", [2]),
        "rank 2 (node-b, process 100) ended, in step 8: DataError: a.jpg",
    )
    # This very process is there.
    alive = heartbeat_of("launch", 0, 8, "in step", 0.0, "")
    assert not alive.is_gone
    assert alive._replace(started=alive.started - 1).is_gone
    assert not alive._replace(started=alive.started - 1, host=OTHER).is_gone


def test_ranks_that_came_to_the_end_are_not_missed():
    assert wrong(beat(0, end=DONE, told=NOW - 99), beat(1))[0] == "level"
    assert wrong(beat(0), beat(1))[2] == "no rank is behind the others: all are in step 8"


def test_the_report_says_where_all_are():
    beats = [beat(0, since=NOW - 59), beat(1, 7, "waiting for images"), beat(2), None]
    text = report(beats, what_is_wrong(beats[:3], NOW, 20), {1: "  MainThread:\n    a.py:3 read: open(path)\n"})
    first, _, _, *lines = text.splitlines()
    assert first.startswith("rank 1 (node-b")
    assert lines == [
        f"  ranks 0, 2: in step 8, since {at(NOW - 60)} to {at(NOW - 59)}",
        f"  rank 1: waiting for images after step 7, since {at(NOW - 60)}",
        "  rank 3: nothing said",
        "",
        "stack of rank 1:",
        "  MainThread:",
        "    a.py:3 read: open(path)",
    ]


def test_where_no_rank_is_behind_the_stack_that_few_have_comes_first():
    waits, hangs = "  MainThread:\n    a.py:1 all_reduce", "  MainThread:\n    b.py:2 read"
    beats = [beat(rank) for rank in range(4)]
    text = report(beats, what_is_wrong(beats, NOW, 20), {0: waits, 1: waits, 2: hangs, 3: waits})
    assert text.endswith(f"\n\nstack of rank 2:\n{hangs}\n\nstack of ranks 0-1, 3:\n{waits}\n")


def test_files_of_other_launches_and_damaged_ones_are_silence(tmp_path):
    for rank, text in enumerate(["{", "[]", '{"launch": "launch"}']):
        (tmp_path / f"rank_{rank}.json").write_text(text)
    write_heartbeat(tmp_path, beat(3))
    write_heartbeat(tmp_path, beat(4)._replace(launch="before"))
    assert read_heartbeats(tmp_path, "launch", range(6)) == [None, None, None, beat(3), None, None]
    write_heartbeat(tmp_path / "nowhere", beat(3))


@pytest.mark.parametrize(("ranks", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")])
def test_ranges(ranks, text):
    assert ranges(ranks) == text
