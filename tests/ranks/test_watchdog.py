"""A rank dies, fails or is stuck: all end, soon or after `watch.timeout`, and name it (faults 18, 19)."""

import json
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from ranks_launcher import FAULTY, PATIENCE, ranks_without_torchrun, torchrun
from small_run import run_settings

from ccmim_fast.errors import DataError, MachineError, StoppedError
from ccmim_fast.ranks.heartbeat import read_heartbeats
from ccmim_fast.ranks.watchdog import Watchdog, is_peer_failure, thread_stacks
from ccmim_fast.runs.claim import claimed
from ccmim_fast.runs.state import process_start, read_state

HALF_AN_HOUR = 30.0  # the default
LAUNCH = "0123456789"
BROKEN = RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1")


def command(folder, fault, at, rank, timeout):
    """Three steps and a checkpoint an epoch, four epochs; 8 images of each step on each rank."""
    more = ["--score.source=first", "--train.epochs=4", "--run.save_every=1", f"--watch.timeout={timeout}"]
    more.append("--train.feature_images=0")  # faults come after so many images of steps
    return [FAULTY, fault, at, str(rank), *run_settings(folder), *more]


def two_ranks(folder, *given):
    """Return exit codes (None of a rank that a signal has stopped, which does not end) and errors of two ranks."""
    stopped = given[2] if given[0] == "stop" else None
    with ranks_without_torchrun(2, folder, *command(folder, *given)) as ranks:
        codes = [None if number == stopped else rank.wait(PATIENCE) for number, rank in enumerate(ranks)]
    return codes, [(folder / f"{rank}.err").read_text() for rank in "01"]


def the_report(folder):
    (path,) = (folder / "run" / "ranks").glob("stopped_*.txt")
    return path.read_text()


def last_line(errors):
    return next(line for line in reversed(errors.splitlines()) if line.startswith("ccmim: "))


@pytest.mark.slow
def test_fault_18_a_rank_is_killed(tmp_path):
    """torchrun without restarts ends the other ranks: they write the report all the same."""
    done = torchrun(2, *command(tmp_path, "kill", "5", 1, HALF_AN_HOUR))
    assert "ccmim: rank 0 ends: rank 1 (" in done.stderr
    assert "died without an error message, perhaps killed; last heartbeat: " in the_report(tmp_path)
    assert the_report(tmp_path) in done.stderr
    assert "Connection closed by peer" not in done.stderr
    state = read_state(tmp_path / "run")
    assert (state.state, state.exit_code) == ("failed", 6)


@pytest.mark.slow
def test_fault_18_a_loader_thread_dies(tmp_path):
    codes, errors = two_ranks(tmp_path, "thread", "40", 1, HALF_AN_HOUR)
    assert codes == [6, 6]
    why = "failed, waiting for images after step 4: MemoryError: no memory for an image"
    assert why in last_line(errors[0])
    assert "Traceback" not in errors[0]
    assert why in the_report(tmp_path)


@pytest.mark.slow
def test_fault_19_rank_0_raises(tmp_path):
    """The third save that fails."""
    codes, errors = two_ranks(tmp_path, "full", "0", 0, HALF_AN_HOUR)
    assert codes == [5, 6]
    assert "failed 3 times in a row" in last_line(errors[0])
    assert "CheckpointError: " in last_line(errors[1])
    assert "Traceback" not in errors[0] + errors[1]
    assert read_state(tmp_path / "run").exit_code == 5


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--run.resume=auto", "--run.overwrite=true"])
def test_ranks_of_a_second_launch_are_told_and_change_nothing(tmp_path, options):
    """Only the first rank holds the folder, and tells; the other one ends with it."""
    run = tmp_path / "run"
    with claimed(run, "the first launch"):
        (run / "metrics.jsonl").write_text("records")
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        command = ["-m", "ccmim_fast.cli", "pretrain", *run_settings(tmp_path), options]
        with ranks_without_torchrun(2, tmp_path, *command) as ranks:
            codes = [rank.wait(PATIENCE) for rank in ranks]
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    errors = [(tmp_path / f"{rank}.err").read_text() for rank in "01"]
    assert codes == [2, 6]
    assert f"process {os.getpid()} on {socket.gethostname()} is at work in it" in last_line(errors[0])
    assert "rank 1 ends: another rank did" in last_line(errors[1])
    assert "Traceback" not in errors[0] + errors[1]


@pytest.mark.slow
def test_a_machine_with_other_images(tmp_path):
    codes, errors = two_ranks(tmp_path, "images", "0", 1, HALF_AN_HOUR)
    assert codes == [6, 3]
    assert (
        f"ccmim: rank 1 on {socket.gethostname()} has other images than rank 0 (48, there 48); data.root" in errors[1]
    )
    assert "DataError: rank 1 on" in last_line(errors[0])
    assert "Traceback" not in errors[0] + errors[1]


@pytest.mark.slow
def test_a_rank_that_is_stopped(tmp_path):
    codes, errors = two_ranks(tmp_path, "stop", "5", 1, 0.1)
    assert codes == [6, None]
    # Its thread may have told of step 5 before it stopped.
    last = r"is silent; last heartbeat: (waiting for images after step 4|in step 5) at .*; rank 0 waits for it; see "
    assert re.search(last, last_line(errors[0]))
    assert re.search(r"\n  ranks? 0(-1)?: in step 5, since ", the_report(tmp_path))
    assert read_state(tmp_path / "run").exit_code == 6


@pytest.mark.slow
def test_a_read_that_does_not_come_back(tmp_path):
    """All end; the stack of the stuck rank shows its call."""
    codes, errors = two_ranks(tmp_path, "blocked", "40", 1, 0.1)
    assert codes == [6, 6]
    report = the_report(tmp_path)
    first = report.splitlines()[0]
    assert first.startswith("rank 1 (")
    assert "is stuck: waiting for images after step 4 since " in first
    assert first.endswith("; rank 0 waits for it")
    assert all(f"ends: {first}; see " in last_line(error) for error in errors)
    assert sum(report in error for error in errors) == 1  # printed once
    stack = report.partition("stack of rank 1:\n")[2]
    assert stack.startswith("  MainThread:\n")
    assert "time.sleep(600)" in stack


def opened(folder, rank=0, world_size=2, **more):
    """One rank's, without the others and without the thread."""
    watchdog = Watchdog(rank, world_size, LAUNCH, **more)
    watchdog._run, watchdog._folder, watchdog._report = folder, folder, folder / "stopped.txt"
    watchdog._write()
    return watchdog


def test_errors_are_translated(tmp_path):
    """A rank raises its own error, others name that rank. An error that all raise by agreement leaves no report."""

    def ends(error, rank, step=0):
        with opened(tmp_path, rank, timeout=60) as watchdog:
            watchdog.enter_phase("in step", step)
            raise error

    with pytest.raises(DataError):
        ends(DataError("a.jpg\ncannot be read"), 1, step=7)
    beat = read_heartbeats(tmp_path, LAUNCH, [1])[0]
    assert (beat.step, beat.outcome) == (7, "DataError: a.jpg cannot be read")
    with pytest.raises(MachineError, match=r"rank 0 ends: rank 1 \(.* failed, in step 7: DataError: a\.jpg") as caught:
        ends(BROKEN, 0)
    assert caught.value.exit_code == 6
    assert caught.value.__cause__ is BROKEN
    (tmp_path / "stopped.txt").unlink()
    with pytest.raises(StoppedError):
        ends(StoppedError("by SIGTERM"), 0)
    assert not (tmp_path / "stopped.txt").exists()


def test_a_lost_rank_of_another_machine_is_silent(tmp_path):
    watchdog = opened(tmp_path, timeout=6)
    opened(tmp_path, 1)._write()
    other = json.loads((tmp_path / "rank_1.json").read_text())
    (tmp_path / "rank_1.json").write_text(json.dumps(other | {"host": "node-b"}))
    start = time.monotonic()
    assert "rank 1 (node-b, process" in str(watchdog.translate_error(BROKEN))
    assert "is silent" in (tmp_path / "stopped.txt").read_text()
    assert time.monotonic() - start > 1


def test_a_killed_rank_of_this_machine_is_noticed_where_no_connection_breaks(tmp_path, monkeypatch, capsys):
    """As under NCCL, the loop hangs in a collective. A rank that lives, or of another machine, ends nothing."""
    watchdog, ends = opened(tmp_path, timeout=60, local_ranks=[0, 1]), []
    monkeypatch.setattr(os, "_exit", ends.append)
    opened(tmp_path, 1)
    now, gone = time.monotonic(), json.loads((tmp_path / "rank_1.json").read_text()) | {"started": 1}
    for age, changed in [(21, {"started": process_start(os.getpid())}), (19, {}), (21, {"host": "node-b"}), (21, {})]:
        assert not ends
        watchdog._phase = ("in step", 8, now - age)
        (tmp_path / "rank_1.json").write_text(json.dumps(gone | changed))
        watchdog._check()
    assert ends == [6]
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("ccmim: rank 0 ends: rank 1 (")
    assert "died without an error message" in line


def test_errors_before_the_start_and_without_other_ranks():
    """Before the start the run's folder is unknown."""
    error = Watchdog(1, 2, "name", 60).translate_error(BROKEN)
    assert isinstance(error, MachineError)
    assert str(error).startswith("rank 1 ends: another rank did, see its own line: [gloo/")
    mine = DataError("no image")
    assert Watchdog(1, 2, "name", 60).translate_error(mine) is mine
    assert Watchdog().translate_error(BROKEN) is BROKEN


def test_errors_that_a_lost_peer_caused():
    texts = ["Application timeout caused pair closure", "[third_party/gloo/gloo/x.cc:78] Timed out waiting 4000ms"]
    assert all(is_peer_failure(RuntimeError(text)) for text in texts)
    assert is_peer_failure(dist.DistBackendError("NCCL error: remote process exited"))
    assert not is_peer_failure(RuntimeError("shape '[2]' is invalid"))
    assert not is_peer_failure(ValueError("gloo/"))


def test_stacks_of_threads_that_have_something_to_do():
    """Another thread asks, as a watchdog does; two threads with the same stack are shown once."""
    go = threading.Event()
    waiting = [threading.Thread(target=go.wait, name=name) for name in ("w0", "w1")]
    for thread in waiting:
        thread.start()
    with ThreadPoolExecutor(1, "idle") as idle, ThreadPoolExecutor(1, "asks") as asks:
        idle.submit(int).result()
        # Until all have come to where they wait.
        told = next(told for _ in range(999) if "  w0, w1:\n" in (told := asks.submit(thread_stacks).result()))
        go.set()
    main = told.partition("\n\n")[0]
    assert main.startswith("  MainThread:\n")
    assert "told = next(" in main
    assert "idle_0" not in told
    assert "asks_0" not in told
