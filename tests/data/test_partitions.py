"""Samples that belong to ranks: each rank has those of its shards, and all of them come as often."""

import itertools

import numpy as np
import pytest
from bank_ranks import Sizes
from hypothesis import given, settings
from hypothesis import strategies as st

from ccmim_fast.data.source import usable_ids, usable_positions
from ccmim_fast.data.stream.plan import Plan, check_partitions
from ccmim_fast.errors import ConfigError


def plans_of(world_size, shards, samples, per_rank=2, accumulate=1, excluded=(), window=0):
    batch = per_rank * accumulate * world_size
    return [
        Plan(Sizes(samples, excluded), 3, batch, accumulate, rank, world_size, window=window, partitions=shards)
        for rank in range(world_size)
    ]


def micro_batches(plans, cursor, count):
    """[count, W, B] ids and epochs."""
    taken = [list(itertools.islice(plan.micro_batches(cursor), count)) for plan in plans]
    return tuple(
        np.stack([[getattr(batch, name) for batch in of_rank] for of_rank in taken], axis=1)
        for name in ("ids_B", "epochs_B")
    )


DIVISIONS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (2, 4), (3, 3), (3, 1), (1, 5), (6, 3)]


@given(
    st.sampled_from(DIVISIONS), st.integers(22, 60), st.sets(st.integers(0, 19), max_size=4), st.sampled_from([0, 100])
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_shows_equally_many_of_each_shard_once(division, samples, excluded, window):
    world_size, shards = division
    plans = plans_of(world_size, shards, samples, per_rank=shards, excluded=excluded, window=window)
    usable = samples - len(excluded)
    epoch = plans[0].samples
    assert epoch == usable // shards * shards
    steps = -(-3 * epoch // plans[0].global_batch)
    ids, epochs = micro_batches(plans, 0, steps)
    for rank, plan in enumerate(plans):
        assert set(usable_positions(plan.source, ids[:, rank].reshape(-1)) % shards) == set(plan.own_partitions)
    for number in range(3):
        shown = ids[epochs == number]
        assert len(set(shown.tolist())) == len(shown) == epoch
        assert not set(shown.tolist()) & excluded
        of_shard = np.bincount(usable_positions(plans[0].source, shown) % shards, minlength=shards)
        assert (of_shard == usable // shards).all()


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_micro_batch_holds_the_same_samples_on_any_ranks(shards):
    """And a rank's ids can be foretold, from any place on."""
    found = []
    for world_size in (1, 2, 4, 8):
        plans = plans_of(world_size, shards, 50, per_rank=16 // world_size, accumulate=2)
        ids, epochs = micro_batches(plans, 32, 6)
        found.append([sorted(zip(i.reshape(-1).tolist(), e.reshape(-1).tolist())) for i, e in zip(ids, epochs)])
        for step in range(3):
            foretold = plans[0].step_ids(32 + 32 * step, range(world_size))
            assert np.array_equal(foretold, ids[2 * step : 2 * step + 2])
            some = range(world_size // 2, world_size)
            assert np.array_equal(plans[-1].step_ids(32 + 32 * step, some), foretold[:, some.start :])
    assert all(other == found[0] for other in found)


def test_who_stays_out_of_an_epoch_changes():
    """23 samples in 4 shards: three shards have one more than the fourth."""
    (plan,) = plans_of(1, 4, 23, per_rank=4)
    assert plan.samples == 20
    ids, _ = plan.ids_at(np.arange(20 * 40))
    out = [set(range(23)) - set(epoch.tolist()) for epoch in ids.reshape(40, 20)]
    assert all({number % 4 for number in numbers} == {0, 1, 2} for numbers in out)
    assert len(set.union(*out)) == 18


def test_shards_have_orders_of_their_own():
    (plan,) = plans_of(1, 2, 400, per_rank=4)
    ids, _ = plan.ids_at(np.arange(400))
    assert not np.array_equal(ids[::2] // 2, ids[1::2] // 2)
    assert np.array_equal(np.sort(ids[::2]), np.arange(0, 400, 2))


def test_numbers_are_the_inverse_of_ids():
    source = Sizes(12, {0, 3, 4, 9})
    assert usable_positions(source, usable_ids(source, np.arange(8))).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("shards", "together", "world_size", "nearest"), [(3, 32, 8, 2), (5, 32, 1, 4), (3, 12, 4, 2), (64, 32, 8, 32)]
)
def test_shards_that_do_not_fit_are_refused(shards, together, world_size, nearest):
    with pytest.raises(ConfigError, match=rf"score.shards={shards} must divide the {together} .* nearest is {nearest}"):
        check_partitions(shards, together, world_size)
    check_partitions(nearest, together, world_size)
