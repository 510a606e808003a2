"""Maps are read and written by steps: the same with any store, any number of ranks, over any restart."""

import numpy as np
import pytest
import torch
from bank_ranks import CELLS, CPU, batches_of, make_plan, rank_main, run, stepped
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_launcher import run_in_ranks

from ccmim_fast.bank.bank import ScoreBank, own_maps
from ccmim_fast.bank.stores import open_store
from ccmim_fast.data.source import usable_count, usable_ids


def by_dictionary(plan, steps, substituted=()):
    """What the maps must be: each step reads all of its samples' maps before it writes any; the last one stays."""
    maps, stream = {}, plan.micro_batches(0)
    for _ in range(steps):
        written = {}
        for _ in range(plan.accumulate):
            shown = next(stream)
            for sample, epoch in zip(shown.ids_B.tolist(), shown.epochs_B.tolist()):
                before = maps.get(sample, 0.0)
                written[sample] = before if sample in substituted else 0.5 * before + 1 + sample % 7 + 8 * epoch
        maps |= {sample: float(torch.tensor(value).half()) for sample, value in written.items()}
    ids = usable_ids(plan.source, np.arange(usable_count(plan.source)))
    return torch.tensor([maps.get(sample, 0.0) for sample in ids.tolist()]).half()


@pytest.mark.parametrize("store", ["device", "host", "file"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("substituted", [(), (4, 8, 20)])
def test_maps_follow_their_samples(store, accumulate, substituted, tmp_path):
    """24 samples in steps of 8 and of 20: the second kind has samples at the seam of two epochs twice in a step."""
    for batch in (8, 20):
        plan = make_plan(batch=batch, accumulate=accumulate)
        opened = open_store(store, own_maps(plan), CELLS, CPU, tmp_path / "scores.bin")
        found = run(plan, opened, 7, substituted=substituted)
        assert found.shape == (24, CELLS, CELLS)
        assert torch.equal(found[:, 0, 0], by_dictionary(plan, 7, substituted))


def test_some_sample_comes_twice_in_a_step():
    """Else the test above would not see which of two writes stays."""
    plan = make_plan(batch=20)
    assert any(len(np.unique(plan.step_ids(20 * step, range(1)))) < 20 for step in range(7))


@given(st.integers(8, 40), st.integers(1, 3), st.integers(0, 6), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_a_run_that_goes_on_has_the_same_maps(samples, accumulate, before, after):
    plan = make_plan(samples=samples, batch=2 * accumulate, accumulate=accumulate, excluded=(1,))
    new = lambda: open_store("host", own_maps(plan), CELLS, CPU, None)  # noqa: E731
    whole = run(plan, new(), before + after)
    part = run(plan, new(), before).clone()
    assert torch.equal(run(plan, new(), after, before * plan.global_batch, part), whole)


def test_a_substitute_has_no_map_and_leaves_none():
    plan = make_plan()
    bank = ScoreBank(plan, open_store("device", own_maps(plan), CELLS, CPU, None), CPU)
    bank.fill(torch.full((24, CELLS, CELLS), 3.0).half())
    planned = plan.step_ids(0, range(1)).reshape(-1)
    gone = int(planned[2])
    (lent,) = bank.read(0, batches_of(plan, plan.micro_batches(0), {gone}))
    assert not lent.maps_BGG[2].any()
    assert bool((lent.maps_BGG[torch.arange(8) != 2] == 3).all())
    bank.write([stepped(lent)])
    assert bool((bank.maps_of(np.array([gone])) == 3).all())
    assert bool((bank.maps_of(np.delete(planned, 2)) != 3).all())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "shards", "accumulate", "store"),
    [(2, 1, 1, "device"), (2, 2, 2, "host"), (4, 2, 1, "file"), (2, 4, 1, "host"), (4, 1, 2, "host")],
)
def test_any_number_of_ranks_has_the_maps_of_one(world_size, shards, accumulate, store, tmp_path):
    """Ranks that share maps, ranks with their own, ranks with several shards; and all of it once more, resumed."""
    alone = make_plan(shards=shards, accumulate=accumulate)
    new = lambda: open_store("device", own_maps(alone), CELLS, CPU, None)  # noqa: E731
    half = run(alone, new(), 5)
    whole = run(alone, new(), 10)
    run_in_ranks(rank_main, world_size, tmp_path, tmp_path, shards, accumulate, store)
    found, again = torch.load(tmp_path / "found.pt")
    assert torch.equal(found, half)
    assert torch.equal(again, whole)
    assert len(half) == 24


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2)])
def test_one_process_goes_on_with_another_number_of_shards(before, after):
    """23 samples: shards of unequal length have a row too many, which is nobody's map."""
    new = lambda plan: open_store("host", own_maps(plan), CELLS, CPU, None)  # noqa: E731
    first = make_plan(shards=before, samples=25, batch=6)
    maps = run(first, new(first), 5)
    assert maps.shape == (23, CELLS, CELLS)
    second = make_plan(shards=after, samples=25, batch=6)
    assert torch.equal(run(second, new(second), 0, maps=maps), maps)


def test_a_rank_keeps_its_own_shards_only():
    assert own_maps(make_plan()) == 24
    assert own_maps(make_plan(1, 2, 2)) == 12
    assert own_maps(make_plan(1, 4, 2)) == 12
    assert own_maps(make_plan(1, 2, 4)) == 12
    assert own_maps(make_plan(0, 2, 2, samples=27)) == 13
