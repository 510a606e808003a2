"""Work done ahead is in order and bounded, and is abandoned without a wait."""

import threading
import time

import numpy as np
import pytest

from ccmim_fast.data.stream.plan import MicroBatch
from ccmim_fast.data.stream.prefetch import AHEAD, prefetch
from ccmim_fast.data.threads import map_ahead, thread_count


def micro_batches(count, started=None):
    for number in range(count):
        if started is not None:
            started.append(number)
        ids_B = np.arange(3 * number, 3 * number + 3)
        yield MicroBatch(ids_B, ids_B // 5, np.stack([ids_B] * 4, axis=1), ids_B % 2 == 0)


def id_of(sample):
    return sample.ids_B.item()


def test_results_come_in_order_with_their_batch():
    def load(sample):
        time.sleep(0.002 * (id_of(sample) % 3 == 0))  # the first of each batch is the last to be ready
        return sample, [part.tolist() for part in sample]

    for batch, results in prefetch(load, micro_batches(20), threads=3):
        assert results == [[[i], [i // 5], [[i] * 4], [i % 2 == 0]] for i in batch.ids_B.tolist()]


def test_the_batch_is_of_what_was_loaded():
    def load(sample):
        other = sample._replace(ids_B=sample.ids_B + 100 * (id_of(sample) == 4))
        return other, id_of(other)

    batches = list(prefetch(load, micro_batches(2), threads=2))
    assert batches[1][0].ids_B.tolist() == batches[1][1] == [3, 104, 5]


def test_work_runs_ahead_but_not_away():
    started = []
    for number, _ in enumerate(prefetch(lambda sample: (sample, None), micro_batches(20, started), threads=2)):
        assert len(started) == min(20, number + 1 + AHEAD)


def test_a_failure_is_raised_when_its_batch_has_its_turn():
    def load(sample):
        if id_of(sample) == 4:
            raise KeyError(4)
        return sample, id_of(sample)

    results = prefetch(load, micro_batches(5), threads=4)
    assert next(results)[1] == [0, 1, 2]
    with pytest.raises(KeyError):
        next(results)


def test_leaving_does_not_wait_for_what_is_under_way():
    # A collector may do the leaving, in a thread that is not free to wait.
    release = threading.Event()
    results = prefetch(lambda s: (s, id_of(s) < 3 or release.wait(60)), micro_batches(5), threads=4)
    next(results)
    leaving = threading.Thread(target=results.close)
    leaving.start()
    leaving.join(10)
    waited = leaving.is_alive()
    release.set()
    assert not waited


@pytest.mark.parametrize(("cores", "ranks", "each"), [(12, None, 12), (12, 1, 12), (12, 5, 2), (3, 8, 1)])
def test_no_workers_means_a_ranks_share_of_the_cores(monkeypatch, cores, ranks, each):
    """torchrun says how many ranks the machine has; an explicit number wins."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert thread_count(0) == each
    assert thread_count(3) == 3


def test_a_map_runs_ahead_of_its_use_in_order():
    begun = []

    def slow_first(number):
        time.sleep(0.02 * (number % 3 == 0))
        return number

    def items():
        for number in range(12):
            begun.append(number)
            yield number

    for number, result in enumerate(map_ahead(slow_first, items(), threads=3, count=4)):
        assert result == number
        assert len(begun) == min(12, number + 1 + 4)
