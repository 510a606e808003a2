"""Ranks keep a score bank over made-up steps: each map is a function of its value before, its sample and the epoch."""

import numpy as np
import torch
import torch.distributed as dist

from ccmim_fast.bank.bank import ScoreBank, own_maps
from ccmim_fast.bank.stores import open_store
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.data.stream.plan import Plan

CELLS = 2
CPU = torch.device("cpu")


class Sizes:
    """A source that has no images, only their number."""

    channels, labels_N, class_names, fingerprint = 3, None, (), "sizes"

    def __init__(self, samples, excluded=()):
        self.sizes_N2 = np.full((samples, 2), 40, dtype=np.int32)
        self.excluded_X = np.array(sorted(excluded), dtype=np.int64)

    def __len__(self):
        return len(self.sizes_N2)


def batches_of(plan, stream, substituted=()):
    """One step's micro-batches; in the place of the samples `substituted` come others."""
    batches = []
    for _ in range(plan.accumulate):
        shown = next(stream)
        ids_B = np.where(np.isin(shown.ids_B, list(substituted)), shown.ids_B ^ 1, shown.ids_B)
        batches.append(
            Batch(torch.empty(0), torch.from_numpy(ids_B), torch.from_numpy(shown.epochs_B), None, None, ids_B)
        )
    return batches


def stepped(batch):
    """The maps after a step: half of what was, and the sample's id and epoch."""
    now_B = 1 + batch.ids_B % 7 + batch.epochs_B * 8
    return (0.5 * batch.maps_BGG.float() + now_B[:, None, None]).half()


def run(plan, store, steps, cursor=0, maps=None, substituted=()):
    """`contents()` after some steps from a place of the stream on."""
    bank = ScoreBank(plan, store, CPU)
    if maps is not None:
        bank.fill(maps)
    stream = plan.micro_batches(cursor)
    for _ in range(steps):
        lent = bank.read(cursor, batches_of(plan, stream, substituted))
        bank.write([stepped(batch) for batch in lent])
        cursor += plan.global_batch
    return bank.contents()


def make_plan(rank=0, world_size=1, shards=1, samples=26, batch=8, accumulate=1, excluded=(3, 11)):
    return Plan(Sizes(samples, excluded), 5, batch, accumulate, rank, world_size, partitions=shards)


def rank_main(rank, world_size, folder, shards, accumulate, store):
    """Take 5 steps, then 5 more with a new bank that is filled with the maps of before; rank 0 writes both results."""
    plan = make_plan(rank, world_size, shards, accumulate=accumulate)
    new = lambda: open_store(store, own_maps(plan), CELLS, CPU, folder / f"scores_{rank}.bin")  # noqa: E731
    maps = run(plan, new(), 5)
    box = [maps]
    dist.broadcast_object_list(box, 0)
    again = run(plan, new(), 5, 5 * plan.global_batch, box[0])
    if rank == 0:
        torch.save((maps, again), folder / "found.pt")
