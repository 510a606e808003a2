"""Rows of all ranks: gradients are those of one process, and nobody waits before there is nothing else to do."""

import pytest
import torch
import torch.distributed as dist
from exchange_ranks import EACH, RANKS, gradients, gradients_of_rank, wait_for_each_other
from ranks_launcher import processes, run_in_ranks
from tiny import images, tiny_model

from ccmim_fast.models.heads import finish_all_gather, start_all_gather

CONTRASTS = ("nce", "moco")  # `align` compares with nobody


@pytest.mark.slow
def test_every_students_gradient_is_that_of_the_global_batch(tmp_path):
    """Two ranks in float64: of each rank's hV, and of all weights."""
    run_in_ranks(gradients_of_rank, RANKS, tmp_path, tmp_path, CONTRASTS)
    for contrast in CONTRASTS:
        expected = gradients(0, 1, contrast)
        found = [torch.load(tmp_path / f"{contrast}_{rank}.pt") for rank in range(RANKS)]
        students = torch.cat([one.pop("visible") for one in found]) / RANKS
        torch.testing.assert_close(students, expected.pop("visible"), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(sum(one.pop("loss") for one in found) / RANKS, expected.pop("loss"))
        for one in found:
            torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_rows_travel_while_the_decoder_runs(tmp_path):
    """One rank sends only after the other is past its decoder: had that one waited first, they would wait for ever."""
    run_in_ranks(wait_for_each_other, 2, tmp_path, processes.Event(), processes.Event())


def test_one_process_sends_nothing():
    assert not dist.is_initialized()
    assert start_all_gather(torch.ones(2, 3)) is None
    assert finish_all_gather(None) is None
    model, _ = tiny_model()
    assert model(images(EACH), torch.arange(EACH), 0).gathered_NE is None


@pytest.mark.parametrize(("init", "spreads"), [("xavier", (0.036, 0.044)), ("torch", (0.021, 0.021))])
def test_initial_spread_of_the_projector(init, spreads):
    """ViT-B's: sqrt(2 / (inputs + outputs)) by Xavier, as in the authors' code; sqrt(1 / (3 inputs)) by torch."""
    torch.manual_seed(0)
    sizes = {"arch": "vit_base_patch16_224", "patch_size": 16, "embed_dim": 0, "depth": 1, "num_heads": 0}
    model, _ = tiny_model(torch.float32, model=sizes, heads={"init": init, "dim": 256})
    matrices = [p for p in model.projector.parameters() if p.ndim == 2]
    assert [m.std().item() for m in matrices] == pytest.approx(spreads, abs=5e-4)
