"""The stream of samples: each comes once an epoch, whatever the ranks and batches, from any position on."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccmim_fast.data.source import usable_ids
from ccmim_fast.data.stream import plan as plan_module
from ccmim_fast.data.stream.plan import MicroBatch, Plan, check_batch
from ccmim_fast.errors import ConfigError, DataError


@pytest.fixture(autouse=True, scope="module")
def _little_at_once():
    """Few samples are planned together, so that each stream does so more than once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_PLANNED_AT_ONCE", 7)
        yield


class Sizes:
    """A source that has no images, only their sizes."""

    channels, labels_N, class_names, fingerprint = 3, None, (), "sizes"

    def __init__(self, samples, excluded=()):
        self.sizes_N2 = np.random.default_rng(0).integers(20, 90, (samples, 2)).astype(np.int32)
        self.excluded_X = np.array(sorted(excluded), dtype=np.int64)

    def __len__(self):
        return len(self.sizes_N2)


def make_plan(samples=50, excluded=(), **changes):
    return Plan(Sizes(samples, excluded), **{"seed": 1, "global_batch": 12, "flip": True, **changes})


def steps_of(plans, cursor, count):
    """Return the samples of all ranks in each step, micro-batch by micro-batch, as (id, epoch, box, flip)."""
    per_rank = [list(itertools.islice(plan.micro_batches(cursor), count * plan.accumulate)) for plan in plans]
    joined = [MicroBatch.join(parts) for parts in zip(*per_rank, strict=True)]
    share = plans[0].accumulate
    steps = [MicroBatch.join(joined[i : i + share]) for i in range(0, len(joined), share)]
    return [[(*map(int, (i, e)), *box.tolist(), bool(f)) for i, e, box, f in zip(*step, strict=True)] for step in steps]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_sample_comes_once_an_epoch_whatever_changes_on_the_way(data):
    samples = data.draw(st.integers(8, 60), "samples")
    excluded = data.draw(st.sets(st.integers(0, samples - 1), max_size=samples - 8), "excluded")
    count, window = samples - len(excluded), data.draw(st.sampled_from([0, 100]), "window")
    cursor, seen = 0, []
    # Legs of a run: each has its own ranks, batch and accumulation, and begins where the last one ended.
    while cursor < 3 * count:
        ranks, accumulate = data.draw(st.integers(1, 2), "ranks"), data.draw(st.integers(1, 2), "accumulate")
        share = ranks * accumulate
        batch = share * data.draw(st.integers(1, count // share), "images")
        options = {"global_batch": batch, "accumulate": accumulate, "world_size": ranks, "window": window}
        plans = [make_plan(samples, excluded, rank=rank, **options) for rank in range(ranks)]
        steps = data.draw(st.integers(1, 4), "steps")
        seen += list(itertools.chain(*steps_of(plans, cursor, steps)))
        cursor += steps * batch
    for epoch in range(3):
        ids = [sample[0] for sample in seen if sample[1] == epoch]
        assert sorted(ids) == sorted(set(range(samples)) - excluded)
    (whole,) = steps_of([make_plan(samples, excluded, global_batch=count, window=window)], 0, 1)
    assert seen[:count] == whole


def test_steps_cross_from_one_epoch_into_the_next():
    plan = make_plan()
    steps = steps_of([plan], 0, 5)
    assert [sample[1] for sample in steps[4]] == [0, 0, *[1] * 10]
    assert steps_of([plan], 36, 2) == steps[3:]


def test_plan_is_the_same_for_any_division():
    whole = steps_of([make_plan()], 24, 3)
    assert {flip for step in whole for *_, flip in step} == {False, True}
    for accumulate, world_size in ((2, 1), (1, 3), (2, 3)):
        plans = [make_plan(accumulate=accumulate, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert steps_of(plans, 24, 3) == whole


def test_plan_without_flip_mirrors_nothing():
    assert not any(flip for step in steps_of([make_plan(flip=False)], 0, 4) for *_, flip in step)


def test_excluded_samples_leave_no_gap():
    source = Sizes(10, {0, 3, 4, 9})
    assert usable_ids(source, np.arange(6)).tolist() == [1, 2, 5, 6, 7, 8]
    assert usable_ids(Sizes(4), np.arange(4)).tolist() == [0, 1, 2, 3]


def test_fallbacks_are_drawn_by_the_sample_and_the_attempt():
    plan = make_plan(2000, excluded=range(1000))
    drawn = [plan.fallback(1500, 3, attempt).ids_B.item() for attempt in range(20)]
    assert drawn == [plan.fallback(1500, 3, attempt).ids_B.item() for attempt in range(20)]
    assert all(1000 <= number < 2000 for number in drawn)
    assert len(set(drawn)) > 15
    others = [
        [plan.fallback(*key, attempt).ids_B.item() for attempt in range(20)]
        for key in ((1501, 3), (1500, 4), (1500 + 2**32, 3))
    ]
    assert all(sum(a == b for a, b in zip(drawn, other, strict=True)) < 3 for other in others)
    alike = make_plan(2000, excluded=range(1000), global_batch=4, world_size=2, rank=1)
    assert alike.fallback(1500, 3, 0).ids_B.item() == drawn[0]
    whole = plan.micro_batch(np.array([drawn[0]]), np.array([3]))
    assert all((a == b).all() for a, b in zip(whole, plan.fallback(1500, 3, 0), strict=True))


def test_batches_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match=r"batch_size=10 must be a multiple of 4 .*nearest is 8"):
        check_batch(100, 10, accumulate=2, world_size=2)
    with pytest.raises(ConfigError, match="batch_size=0"):
        check_batch(100, 0, accumulate=1, world_size=1)
    with pytest.raises(DataError, match=r"^30 images are fewer than train\.batch_size=32; set train\.batch_size=28 or"):
        check_batch(30, 32, accumulate=2, world_size=2)
    with pytest.raises(DataError, match=r"^3 images .*at least 4 images"):
        check_batch(3, 8, accumulate=2, world_size=2)
    check_batch(32, 32, accumulate=2, world_size=2)


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (2, 1), (1, 2)])
def test_repeats_give_a_sample_several_times_in_a_row(ranks, accumulate):
    """An epoch stays as long, and takes the first third of its order, three times each, as in DeiT."""
    options = {"global_batch": 12, "repeats": 3, "accumulate": accumulate, "world_size": ranks}
    plans = [make_plan(60, rank=rank, **options) for rank in range(ranks)]
    seen = list(itertools.chain(*steps_of(plans, 0, 10)))
    epochs = [seen[:60], seen[60:]]
    orders = [list(itertools.chain(*steps_of([make_plan(60, global_batch=60)], 60 * e, 1))) for e in (0, 1)]
    for epoch, (some, order) in enumerate(zip(epochs, orders, strict=True)):
        assert [sample[0] for sample in some[::3]] == [sample[0] for sample in order[:20]]
        for first in range(0, 60, 3):
            group = some[first : first + 3]
            assert {sample[0] for sample in group} == {group[0][0]}
            assert [sample[1] for sample in group] == [3 * epoch, 3 * epoch + 1, 3 * epoch + 2]
            assert len({sample[2:6] for sample in group}) == 3  # crops
    assert {s[0] for s in epochs[0]} != {s[0] for s in epochs[1]}
    # The same from any position on, within a group too.
    assert steps_of(plans, 24, 3) == steps_of(plans, 0, 5)[2:]


def test_repeats_that_do_not_divide_an_epoch_are_cut_at_its_end():
    seen = steps_of([make_plan(50, global_batch=25, repeats=3)], 0, 4)
    counts = [np.bincount([sample[0] for sample in seen[i] + seen[i + 1]]).tolist() for i in (0, 2)]
    assert all(sorted(c for c in count if c) == [2, *[3] * 16] for count in counts)


def test_repeats_stay_with_the_partition_of_their_sample():
    plans = [make_plan(60, global_batch=12, repeats=3, partitions=2, world_size=2, rank=rank) for rank in (0, 1)]
    for rank, plan in enumerate(plans):
        ids = np.concatenate([part.ids_B for part in itertools.islice(plan.micro_batches(0), 10)])
        assert (ids % 2 == rank).all()
        assert (ids.reshape(-1, 3) == ids[::3, None]).all()
