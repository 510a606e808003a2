"""What each rank does in `test_choices.py`: the first decides, and all take steps with its choices."""

import torch
from tiny import tiny_config

from ccmim_fast.autotune.decide import Decision
from ccmim_fast.engine import choices
from ccmim_fast.engine.build import build_step
from ccmim_fast.engine.dry_run import synthetic_batch
from ccmim_fast.ranks.session import Session

CHOSEN = {"attention 7 x 3 x 16": Decision("plain", {"sdpa": 2.0, "plain": 1.0}, {})}


def decide_on_the_first(rank, world_size, parallel):
    def decided(*_):
        assert rank == 0, "another rank than the first measures"
        return CHOSEN

    choices.fastest_that_agree = decided
    here = Session(rank, world_size, torch.device("cpu"))
    train = {"batch_size": 8, "precision": "fp32", "parallel": parallel, "autotune": "fresh"}
    step = build_step(tiny_config(train=train), here)
    before = [p.detach().clone() for p in step.model.parameters()]
    table = choices.choose(step, 4, here, 10**12)
    assert table.decisions == CHOSEN
    choices.apply(table, step)
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters()))
    assert step.model.encoder.blocks[0].attention == (((7, 3, 16), "plain"),)
    for _ in range(2):
        result = step([synthetic_batch(step, 4)], 1e-3)
    assert torch.isfinite(result.total)
