"""The order of the samples, its split over ranks and micro-batches, and the plan made of both."""

import numpy as np
import pytest

from ccmim_fast.data.plan import Plan
from ccmim_fast.data.sampler import check_batch, epoch_order, rank_batches
from ccmim_fast.errors import ConfigError, DataError


def test_order_is_a_keyed_permutation():
    order = epoch_order(3, 1, 5000)
    assert order.dtype == np.int64
    assert (np.sort(order) == np.arange(5000)).all()
    assert (epoch_order(3, 1, 5000) == order).all()
    for other in (epoch_order(3, 2, 5000), epoch_order(4, 1, 5000), np.arange(5000)):
        assert (other == order).mean() < 0.01
    assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.06


def test_order_of_a_subset_is_kept_when_samples_are_added():
    # The keys belong to the ids, not to their number.
    longer = epoch_order(3, 1, 1200)
    assert (longer[longer < 1000] == epoch_order(3, 1, 1000)).all()


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (1, 4), (3, 1), (3, 4)])
def test_ranks_and_micro_batches_divide_a_step(accumulate, world_size):
    order = epoch_order(0, 0, 100)
    ranks = [rank_batches(order, 1, 36, accumulate, rank, world_size) for rank in range(world_size)]
    for micro in range(accumulate):
        together = np.concatenate([ids_AB[micro] for ids_AB in ranks])
        share = 36 // accumulate
        assert (together == order[36 + micro * share : 36 + (micro + 1) * share]).all()


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


def make_plan(**changes):
    sizes_N2 = np.random.default_rng(0).integers(20, 90, (50, 2)).astype(np.int32)
    return Plan(sizes_N2, **{"seed": 1, "global_batch": 12, "flip": True, **changes})


def samples_of(micro_batches):
    """{id: (box, flip)} of all micro-batches."""
    return {
        int(index): (*box.tolist(), bool(flip))
        for batch in micro_batches
        for index, box, flip in zip(*batch, strict=True)
    }


def test_plan_is_the_same_for_any_division():
    whole = samples_of(make_plan().micro_batches(5))
    assert len(whole) == 48  # the incomplete fifth step is dropped
    assert {flip for *_, flip in whole.values()} == {False, True}
    for accumulate, world_size in ((2, 1), (1, 3), (2, 3)):
        plans = [make_plan(accumulate=accumulate, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert all(plan.steps_per_epoch == 4 for plan in plans)
        assert all(len(list(plan.micro_batches(5))) == 4 * accumulate for plan in plans)
        together = {}
        for plan in plans:
            together |= samples_of(plan.micro_batches(5))
        assert together == whole


def test_plan_goes_on_at_a_step():
    plan = make_plan(accumulate=2)
    rest = list(plan.micro_batches(0, start_step=3))
    assert len(rest) == 2
    for batch, expected in zip(rest, list(plan.micro_batches(0))[6:]):
        assert all((part == other).all() for part, other in zip(batch, expected))
    assert list(plan.micro_batches(0, start_step=4)) == []


def test_plan_without_flip_mirrors_nothing():
    assert not any(batch.flips_B.any() for batch in make_plan(flip=False).micro_batches(0))
