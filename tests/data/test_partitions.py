"""Partitions: each rank has the samples of its own ones, and all samples come equally often."""

import itertools

import numpy as np
import pytest
from bank_ranks import Sizes
from hypothesis import given, settings
from hypothesis import strategies as st

from ccmim_fast.data.source import usable_ids, usable_positions
from ccmim_fast.data.stream.plan import Plan, check_partitions
from ccmim_fast.errors import ConfigError


def plans_of(world_size, partitions, samples, per_rank=2, accumulate=1, excluded=(), window=0):
    batch = per_rank * accumulate * world_size
    return [
        Plan(Sizes(samples, excluded), 3, batch, accumulate, rank, world_size, window=window, partitions=partitions)
        for rank in range(world_size)
    ]


def micro_batches(plans, cursor, count):
    """Return ids and epochs, [count, W, B]."""
    taken = [list(itertools.islice(plan.micro_batches(cursor), count)) for plan in plans]
    return tuple(
        np.stack([[getattr(batch, name) for batch in of_rank] for of_rank in taken], axis=1)
        for name in ("ids_B", "epochs_B")
    )


DIVISIONS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (2, 4), (3, 3), (3, 1), (1, 5), (6, 3)]


@given(
    st.sampled_from(DIVISIONS), st.integers(22, 60), st.sets(st.integers(0, 19), max_size=4), st.sampled_from([0, 100])
)
@settings(max_examples=30, deadline=None)
def test_an_epoch_has_equally_many_of_each_partition_once(division, samples, excluded, window):
    world_size, partitions = division
    plans = plans_of(world_size, partitions, samples, per_rank=partitions, excluded=excluded, window=window)
    usable = samples - len(excluded)
    epoch = plans[0].samples
    assert epoch == usable // partitions * partitions
    steps = -(-3 * epoch // plans[0].global_batch)
    ids, epochs = micro_batches(plans, 0, steps)
    for rank, plan in enumerate(plans):
        assert set(usable_positions(plan.source, ids[:, rank].reshape(-1)) % partitions) == set(plan.own_partitions)
    for number in range(3):
        seen = ids[epochs == number]
        assert len(set(seen.tolist())) == len(seen) == epoch
        assert not set(seen.tolist()) & excluded
        of_partition = np.bincount(usable_positions(plans[0].source, seen) % partitions, minlength=partitions)
        assert (of_partition == usable // partitions).all()


@pytest.mark.parametrize("partitions", [1, 2, 4])
def test_a_micro_batch_holds_the_same_samples_on_any_ranks(partitions):
    """The ids of any rank are known beforehand, from any position on."""
    found = []
    for world_size in (1, 2, 4, 8):
        plans = plans_of(world_size, partitions, 50, per_rank=16 // world_size, accumulate=2)
        ids, epochs = micro_batches(plans, 32, 6)
        found.append([sorted(zip(i.reshape(-1).tolist(), e.reshape(-1).tolist())) for i, e in zip(ids, epochs)])
        for step in range(3):
            expected = plans[0].step_ids(32 + 32 * step, range(world_size))
            assert np.array_equal(expected, ids[2 * step : 2 * step + 2])
            some = range(world_size // 2, world_size)
            assert np.array_equal(plans[-1].step_ids(32 + 32 * step, some), expected[:, some.start :])
    assert all(other == found[0] for other in found)


def test_who_stays_out_of_an_epoch_changes():
    """23 samples in 4 partitions: three partitions have one more than the fourth."""
    (plan,) = plans_of(1, 4, 23, per_rank=4)
    assert plan.samples == 20
    ids, _ = plan.ids_at(np.arange(20 * 40))
    out = [set(range(23)) - set(epoch.tolist()) for epoch in ids.reshape(40, 20)]
    assert all({number % 4 for number in numbers} == {0, 1, 2} for numbers in out)
    assert len(set.union(*out)) == 18


def test_partitions_have_orders_of_their_own():
    (plan,) = plans_of(1, 2, 400, per_rank=4)
    ids, _ = plan.ids_at(np.arange(400))
    assert not np.array_equal(ids[::2] // 2, ids[1::2] // 2)
    assert np.array_equal(np.sort(ids[::2]), np.arange(0, 400, 2))


def test_numbers_are_the_inverse_of_ids():
    source = Sizes(12, {0, 3, 4, 9})
    assert usable_positions(source, usable_ids(source, np.arange(8))).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("partitions", "together", "world_size", "nearest"), [(3, 32, 8, 2), (5, 32, 1, 4), (3, 12, 4, 2), (64, 32, 8, 32)]
)
def test_partitions_that_do_not_fit_are_refused(partitions, together, world_size, nearest):
    with pytest.raises(
        ConfigError, match=rf"score.shards={partitions} must divide the {together} .* nearest is {nearest}"
    ):
        check_partitions(partitions, together, world_size)
    check_partitions(nearest, together, world_size)
