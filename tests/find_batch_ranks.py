"""Two ranks that look for the largest micro-batch, of which the second has less memory.

Started by tests/ranks/test_find_batch.py, which looks at what they found.
"""

from unittest.mock import patch

import torch
from few_steps import config_for

from ccmim_fast.engine.memory import with_largest_batch
from ccmim_fast.engine.step import TrainStep
from ccmim_fast.ranks.session import Session

BATCH, FITTING = 24, (12, 5)  # images of a rank; how many of them fit each


def rank_main(rank, world_size, folder):
    tried, passes = [], TrainStep._passes

    def full(step, batches):
        images = len(batches[0].ids_B)
        tried.append(images)
        if images > FITTING[rank]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return passes(step, batches)

    config = config_for(batch_size=BATCH * world_size, device="cpu", parallel="ddp")
    with patch.object(TrainStep, "_passes", full):
        found = with_largest_batch(config, Session(rank, world_size, torch.device("cpu")))
    torch.save({"accumulate": found.train.accumulate, "tried": tried}, folder / f"found_{rank}.pt")
