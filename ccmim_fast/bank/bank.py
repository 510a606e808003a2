"""The score bank: a small map per sample of where [CLS] looked when the sample came by last.

Each step's own two passes tell how much [CLS] attends to every patch; kept, that is a score from all blocks at no pass
more. A map stays with the ranks that train on its sample (`Plan.partitions`).
"""

# A micro-batches of a step, W ranks, S of them with the same maps, B images, G cells per side, N samples

from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ccmim_fast.bank.stores import Store
from ccmim_fast.data.source import usable_count, usable_positions
from ccmim_fast.data.stream.batch import Batch, to_device
from ccmim_fast.data.stream.plan import Plan

_CHUNK = 65536  # maps that one message to the first rank holds


def own_maps(plan: Plan) -> int:
    """How many maps this rank keeps: one for each sample of its shards."""
    return -(-usable_count(plan.source) // plan.partitions) * len(plan.own_partitions)


class ScoreBank:
    """The maps of one rank's samples, lent to each step and taken back from it.

    All maps of a step are read before any is written. What is shown in the place of a sample that cannot be decoded has
    no map and leaves none.

    Args:
        plan: what this rank trains on.
        store: of `own_maps(plan)` maps.
        device: where batches are.
        timeout: that a rank waits for another; None: the backend's.
    """

    def __init__(self, plan: Plan, store: Store, device: torch.device, timeout: timedelta | None = None):
        self._plan, self._store, self._device = plan, store, device
        # Ranks with the same shards have the same maps, and tell each other what became of them.
        sharing = max(1, plan.world_size // plan.partitions)
        first = plan.rank // sharing * sharing
        self._sharing = range(first, first + sharing)
        self._group = _groups(plan.world_size, sharing, plan.rank, timeout) if sharing > 1 else None
        self._next: tuple[int, np.ndarray] | None = None  # a cursor, and the ids of the step there

    def lend(self, cursor: int, batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches of the step at this place of the stream, with their maps."""
        plan = self._plan
        ids_ASB, place = self._ids_at(cursor), plan.rank - self._sharing.start
        self._rows_ASB = self._rows_of(ids_ASB)
        planned_AB, rows_AB = ids_ASB[:, place], self._rows_ASB[:, place]
        maps_ABGG = self._store.take(rows_AB.reshape(-1)).unflatten(0, rows_AB.shape)
        shown_AB = planned_AB == np.stack([batch.host_ids_B for batch in batches])
        self._kept = None
        if not shown_AB.all():
            shown = to_device(shown_AB, self._device)[..., None, None]
            self._kept = (shown, maps_ABGG)
            maps_ABGG = torch.where(shown, maps_ABGG, 0)
        after = cursor + plan.global_batch
        self._next = (after, self._ids_at(after))
        self._store.expect(self._rows_of(self._next[1][:, place]).reshape(-1))
        return [batch._replace(maps_BGG=maps_BGG) for batch, maps_BGG in zip(batches, maps_ABGG, strict=True)]

    def take_back(self, maps: Sequence[Tensor]) -> None:
        """The maps of the step that some were lent to last, after it: for each micro-batch [B, G, G]."""
        maps_ABGG = torch.stack(list(maps))
        if self._kept is not None:
            maps_ABGG = torch.where(self._kept[0], maps_ABGG, self._kept[1])
        maps_ASBGG = maps_ABGG[:, None]
        if self._group is not None:
            parts = [torch.empty_like(maps_ABGG) for _ in self._sharing]
            dist.all_gather(parts, maps_ABGG, group=self._group)
            maps_ASBGG = torch.stack(parts, dim=1)
        rows, maps = self._rows_ASB.reshape(-1), maps_ASBGG.flatten(0, 2)
        last = _last_of_each(rows)
        if len(last) < len(rows):
            rows, maps = rows[last], maps.index_select(0, to_device(last, self._device))
        self._store.put(rows, maps)

    def contents(self) -> Tensor | None:
        """The maps of all usable samples in order of their ids [N, G, G] on the host, on rank 0; elsewhere None.

        Every rank is to call it.
        """
        plan, own_NGG = self._plan, self._store.contents()
        if plan.world_size == 1 and plan.partitions == 1:
            return own_NGG
        # Of ranks with the same maps the first sends.
        step = len(self._sharing)
        if plan.rank:
            if plan.rank == self._sharing.start:
                for part in own_NGG.split(_CHUNK):
                    dist.send(part.to(self._device), 0)
            return None
        all_NGG = torch.empty(usable_count(plan.source), *own_NGG.shape[1:], dtype=torch.float16)
        for owner in range(0, plan.world_size, step):
            numbers = torch.from_numpy(self._numbers_on(owner))
            for part, numbers_P in zip(own_NGG.split(_CHUNK), numbers.split(_CHUNK), strict=True):
                part = part.to(self._device, copy=True)
                if owner:
                    dist.recv(part, owner)
                real_P = numbers_P < len(all_NGG)
                all_NGG[numbers_P[real_P]] = part.cpu()[real_P]
        return all_NGG

    def fill(self, maps_NGG: Tensor) -> None:
        """Take over the maps that `contents` gave, at any world size; on every rank."""
        if self._plan.world_size == self._plan.partitions == 1:
            self._store.fill(maps_NGG)
            return
        numbers = torch.from_numpy(self._numbers_on(self._plan.rank)).clamp_max(len(maps_NGG) - 1)
        self._store.fill(maps_NGG[numbers])

    def maps_of(self, ids_P: np.ndarray) -> Tensor:
        """The maps of some samples of this rank's shards [P, G, G] on the device, to look at."""
        return self._store.take(self._rows_of(ids_P))

    def _ids_at(self, cursor: int) -> np.ndarray:
        if self._next is not None and self._next[0] == cursor:
            return self._next[1]
        return self._plan.step_ids(cursor, self._sharing)

    def _rows_of(self, ids: np.ndarray) -> np.ndarray:
        """The rows of samples of this rank's shards: shard by shard in turn, in the order of their numbers."""
        own = self._plan.own_partitions
        order, shard = np.divmod(usable_positions(self._plan.source, ids.reshape(-1)), self._plan.partitions)
        return (order * len(own) + shard - own.start).reshape(ids.shape)

    def _numbers_on(self, rank: int) -> np.ndarray:
        """The inverse for a rank: the samples' numbers by row. A last row of a short shard has a number too high."""
        own = len(self._plan.own_partitions)
        start = self._plan.own_partitions.start - self._plan.rank // len(self._sharing) * own
        start += rank // len(self._sharing) * own
        order, shard = np.divmod(np.arange(own_maps(self._plan)), own)
        return order * self._plan.partitions + start + shard


def _groups(world_size: int, sharing: int, rank: int, timeout: timedelta | None) -> "dist.ProcessGroup":
    """The group of a rank; all ranks make all groups."""
    firsts = range(0, world_size, sharing)
    groups = [dist.new_group(range(first, first + sharing), timeout=timeout) for first in firsts]
    return groups[rank // sharing]


def _last_of_each(rows: np.ndarray) -> np.ndarray:
    """Places of the last occurrence of each row; ascending."""
    _, from_behind = np.unique(rows[::-1], return_index=True)
    return np.sort(len(rows) - 1 - from_behind)
