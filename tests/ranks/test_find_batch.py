"""train.find_batch on several ranks, one of which has less memory than the other."""

import itertools

import pytest
import torch
from find_batch_ranks import BATCH, FITTING, rank_main
from ranks_launcher import run_in_ranks


@pytest.mark.slow
def test_ranks_of_unequal_memory_agree(tmp_path):
    """The rank that has more does not wait for the other one in the middle of a trial, nor try anything else."""
    run_in_ranks(rank_main, 2, tmp_path, tmp_path)
    found = [torch.load(tmp_path / f"found_{rank}.pt") for rank in range(2)]
    assert [one["accumulate"] for one in found] == [6, 6]  # 4 images: 5 do not divide 24
    assert min(FITTING) >= BATCH // 6
    # A trial of two steps where there is room; the same trials on both ranks.
    tried = [[images for images, _ in itertools.groupby(one["tried"])] for one in found]
    assert tried[0] == tried[1]
    assert {8, 6} <= {*tried[0]}, "the first rank has room for them: the test tests nothing"
