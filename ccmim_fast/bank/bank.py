"""The score bank keeps a small map per sample of where [CLS] attended when the sample was last in a step.

A step's own two passes tell how much [CLS] attends to every patch. Kept until the sample comes again, that is a score
from all blocks at no extra pass. A map stays with the ranks that train on its sample (`Plan.partitions`).

A map covers the whole image with its cells, whatever the size of the image; crops read and write it by bilinear
warps. A cell holds a score: the log of how much more than its share of [CLS]'s attention a patch there got, so 0 is
exactly its share. A cell that no crop has covered yet holds 0 too.
"""

# A micro-batches of a step, S ranks with the same maps, B images, G cells per side, N samples, P some of them; in the
# warps R x C patches of a crop (L of them), and P places along one axis

from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ccmim_fast.data.source import usable_count, usable_positions
from ccmim_fast.data.stream.batch import Batch, to_device
from ccmim_fast.data.stream.plan import Plan

_CHUNK = 65536  # maps in one message to the first rank
_LEAST_SHARE = 1e-3  # of a cell's weights on patches with a score: less may be but the rounding of their places


def own_maps(plan: Plan) -> int:
    """Return how many maps this rank keeps: one for each sample of its partitions."""
    return -(-usable_count(plan.source) // plan.partitions) * len(plan.own_partitions)


class DeviceStore:
    """N maps [N, G, G] float16 in the training device's memory, written in place; other stores have these methods."""

    def __init__(self, maps_NGG: Tensor, device: torch.device):
        self._maps_NGG, self._device = maps_NGG, device

    def read(self, rows_P: np.ndarray) -> Tensor:
        """Return a copy of some rows, [P, G, G], on the training device."""
        return self._maps_NGG.index_select(0, self._index(rows_P))

    def write(self, rows_P: np.ndarray, maps_PGG: Tensor) -> None:
        """Replace some rows, each one at most once; the maps are on the training device."""
        self._maps_NGG.index_copy_(0, self._index(rows_P), maps_PGG)

    def _index(self, rows_P: np.ndarray) -> Tensor:
        rows = torch.from_numpy(rows_P)
        # Only pinned memory is copied asynchronously.
        return rows.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else rows

    def prefetch(self, rows_P: np.ndarray) -> None:
        """Announce rows that will be read soon: only a file is slow enough to fetch them beforehand."""

    def contents(self) -> Tensor:
        """Return all maps [N, G, G] on the host, as of now; the caller does not write to them."""
        return self._maps_NGG.cpu()

    def fill(self, maps_NGG: Tensor) -> None:
        """Replace all maps by maps on the host."""
        self._maps_NGG.copy_(maps_NGG)


class ScoreBank:
    """The maps of one rank's samples. Each step reads those of its samples, and writes them afterwards.

    All maps of a step are read before any is written. An image that is shown in the place of one that cannot be decoded
    has no map and leaves none. `store` has `own_maps(plan)` maps; `timeout` is how long a rank waits for another.
    """

    def __init__(self, plan: Plan, store: DeviceStore, device: torch.device, timeout: timedelta | None = None):
        self._plan, self._store, self._device = plan, store, device
        # Ranks with the same partitions keep the same maps, and exchange what they write.
        replicas = max(1, plan.world_size // plan.partitions)
        groups = [range(first, first + replicas) for first in range(0, plan.world_size, replicas)]
        self._replicas, self._group = groups[plan.rank // replicas], None
        if replicas > 1:  # all ranks make all groups
            self._group = [dist.new_group(ranks, timeout=timeout) for ranks in groups][plan.rank // replicas]
        self._next: tuple[int, np.ndarray] | None = None  # a cursor, and the ids of the step there

    def read(self, cursor: int, batches: Sequence[Batch]) -> list[Batch]:
        """Return the micro-batches of the step at this place of the stream, with their maps."""
        plan = self._plan
        ids_ASB, own = self._ids_at(cursor), plan.rank - self._replicas.start
        self._rows_ASB = self._rows_of(ids_ASB)
        rows_AB = self._rows_ASB[:, own]
        maps_ABGG = self._store.read(rows_AB.reshape(-1)).unflatten(0, rows_AB.shape)
        shown_AB = ids_ASB[:, own] == np.stack([batch.host_ids_B for batch in batches])
        self._unchanged = None
        if not shown_AB.all():
            shown = to_device(shown_AB, self._device)[..., None, None]
            self._unchanged = (shown, maps_ABGG)
            maps_ABGG = torch.where(shown, maps_ABGG, 0)
        after = cursor + plan.global_batch
        self._next = (after, self._ids_at(after))
        self._store.prefetch(self._rows_of(self._next[1][:, own]).reshape(-1))
        return [batch._replace(maps_BGG=maps_BGG) for batch, maps_BGG in zip(batches, maps_ABGG, strict=True)]

    def write(self, maps: Sequence[Tensor]) -> None:
        """Write the maps of the step that was read last: [B, G, G] of each micro-batch."""
        maps_ABGG = torch.stack(list(maps))
        if self._unchanged is not None:
            shown, before_ABGG = self._unchanged
            maps_ABGG = torch.where(shown, maps_ABGG, before_ABGG)
        maps_ASBGG = maps_ABGG[:, None]
        if self._group is not None:
            # One message: torch sends a list of tensors by as many broadcasts (2.15, NCCL).
            # The parts stand one behind the other in the first dimension, the only layout that gloo takes too.
            gathered = maps_ABGG.new_empty(len(self._replicas) * len(maps_ABGG), *maps_ABGG.shape[1:])
            dist.all_gather_into_tensor(gathered, maps_ABGG, group=self._group)
            maps_ASBGG = gathered.unflatten(0, (len(self._replicas), len(maps_ABGG))).transpose(0, 1)
        rows, maps = self._rows_ASB.reshape(-1), maps_ASBGG.flatten(0, 2)
        # A sample that comes twice in a step, where two epochs meet, keeps the later map.
        last = np.sort(len(rows) - 1 - np.unique(rows[::-1], return_index=True)[1])
        if len(last) < len(rows):
            rows, maps = rows[last], maps.index_select(0, to_device(last, self._device))
        self._store.write(rows, maps)

    def contents(self) -> Tensor | None:
        """Return all maps by usable sample [N, G, G] on the host, on rank 0; None elsewhere. Every rank calls it."""
        plan, own_NGG = self._plan, self._store.contents()
        if plan.world_size == plan.partitions == 1:
            return own_NGG
        if plan.rank:
            if plan.rank == self._replicas.start:  # the first of those with the same maps sends them
                for part in own_NGG.split(_CHUNK):
                    dist.send(part.to(self._device), 0)
            return None
        all_NGG = torch.empty(usable_count(plan.source), *own_NGG.shape[1:], dtype=torch.float16)
        for owner in range(0, plan.world_size, len(self._replicas)):
            positions = torch.from_numpy(self._positions_on(owner))
            for part, positions_P in zip(own_NGG.split(_CHUNK), positions.split(_CHUNK), strict=True):
                part = part.to(self._device, copy=True)
                if owner:
                    dist.recv(part, owner)
                real_P = positions_P < len(all_NGG)
                all_NGG[positions_P[real_P]] = part.cpu()[real_P]
        return all_NGG

    def fill(self, maps_NGG: Tensor) -> None:
        """Replace all maps by what `contents` returned, at any world size; every rank calls it."""
        if self._plan.world_size == self._plan.partitions == 1:
            self._store.fill(maps_NGG)
            return
        positions = torch.from_numpy(self._positions_on(self._plan.rank)).clamp_max(len(maps_NGG) - 1)
        self._store.fill(maps_NGG[positions])

    def maps_of(self, ids_P: np.ndarray) -> Tensor:
        """Return the maps of some samples of this rank's partitions, [P, G, G], on the device."""
        return self._store.read(self._rows_of(ids_P))

    def _ids_at(self, cursor: int) -> np.ndarray:
        if self._next is not None and self._next[0] == cursor:
            return self._next[1]
        return self._plan.step_ids(cursor, self._replicas)

    def _rows_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the rows of samples of this rank's partitions, which take turns in the order of positions."""
        own = self._plan.own_partitions
        order, partition = np.divmod(usable_positions(self._plan.source, ids.reshape(-1)), self._plan.partitions)
        return (order * len(own) + partition - own.start).reshape(ids.shape)

    def _positions_on(self, rank: int) -> np.ndarray:
        """Return the positions of the samples in a rank's rows; that of a short partition's last row is too high."""
        own = len(self._plan.own_partitions)
        groups_between = rank // len(self._replicas) - self._plan.rank // len(self._replicas)
        order, partition = np.divmod(np.arange(own_maps(self._plan)), own)
        return order * self._plan.partitions + self._plan.own_partitions.start + groups_between * own + partition


def read_maps(maps_BGG: Tensor, boxes_B4: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the scores at the centres of a crop's patches.

    A score is interpolated between the centres of four cells; beyond the outermost centres the nearest counts. For the
    crop that is the whole image, with as many patches as cells, scores are the cells themselves.

    Args:
        maps_BGG: float; float16 in a run.
        boxes_B4: float64, the crops as in `Batch`.
        grid: R, C.

    Returns:
        scores [B, L], and the share of each interpolation that came from cells with a score [B, L], 0 .. 1; float32
        (float64 for float64 maps).
    """
    cells, maps = maps_BGG.shape[1], maps_BGG.to(torch.promote_types(maps_BGG.dtype, torch.float32))
    weights = []
    for axis, patches in enumerate(grid):
        start_B1, extent_B1 = boxes_B4[:, axis, None], boxes_B4[:, axis + 2, None]
        in_image_BP = start_B1 + extent_B1 * _centres(patches, boxes_B4)  # 0 .. 1
        weights.append(_hats(in_image_BP * cells - 0.5, cells).to(maps.dtype))
    return _interpolate(maps, *weights), _interpolate((maps_BGG != 0).to(maps.dtype), *weights)


def update_maps(
    maps_BGG: Tensor,
    boxes_B4: Tensor,
    scores_BL: Tensor,
    grid: tuple[int, int],
    momentum: float,
    scored_BL: Tensor | None = None,
) -> Tensor:
    """Return the maps after a crop's patches got these scores; a new tensor like `maps_BGG`.

    A cell whose centre lies in the crop becomes momentum * cell + (1 - momentum) * score, or the score alone where it
    had none. The score is interpolated between the centres of four patches; beyond the outermost ones the nearest
    counts. Other cells stay, and all cells stay where some score of the crop is not finite.

    Where only some of the four patches have a score, u is their share of the weights. The cell becomes
    (1 - (1 - momentum) * u) * cell + (1 - momentum) * u * score, with the mean of theirs as its score, or that score
    alone where it had none and u is no rounding. With u = 0 it stays.

    `maps_BGG`, `boxes_B4` and `grid` are as in `read_maps`, scores float32 (float64 for float64 maps); `scored_BL` is
    bool, the patches that have a score, None for all.
    """
    cells, before_BGG = maps_BGG.shape[1], maps_BGG.to(torch.promote_types(maps_BGG.dtype, torch.float32))
    weights, inside = [], []
    for axis, patches in enumerate(grid):
        start_B1, extent_B1 = boxes_B4[:, axis, None], boxes_B4[:, axis + 2, None]
        in_crop_BG = (_centres(cells, boxes_B4) - start_B1) / extent_B1  # 0 .. 1 is inside
        weights.append(_hats(in_crop_BG * patches - 0.5, patches).to(before_BGG.dtype))
        inside.append((in_crop_BG >= 0) & (in_crop_BG <= 1))

    def at_cells(values_BL: Tensor) -> Tensor:
        values_BRC = values_BL.to(before_BGG.dtype).unflatten(1, grid)
        return _interpolate(values_BRC, *weights).unflatten(1, (cells, cells))

    if scored_BL is None:
        seen_BGG = at_cells(scores_BL)
        kept_BGG, added_BGG = momentum * before_BGG, (1 - momentum) * seen_BGG
    else:
        share_BGG = at_cells(scored_BL)
        part_BGG = at_cells(torch.where(scored_BL, scores_BL, 0))
        kept_BGG, added_BGG = (1 - (1 - momentum) * share_BGG) * before_BGG, (1 - momentum) * part_BGG
        seen_BGG = torch.where(share_BGG > _LEAST_SHARE, part_BGG / share_BGG, 0)  # 0: still none
    mixed_BGG = torch.where(before_BGG == 0, seen_BGG, kept_BGG + added_BGG)
    after_BGG = torch.where(mixed_BGG.isfinite(), mixed_BGG, before_BGG)
    return torch.where(inside[0][:, :, None] & inside[1][:, None, :], after_BGG.to(maps_BGG.dtype), maps_BGG)


def _centres(count: int, like: Tensor) -> Tensor:
    return (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count


def _hats(places_BP: Tensor, count: int) -> Tensor:
    """Return weights of linear interpolation between 0, 1, .. count - 1 [B, P, count]; clamped at both ends."""
    at_BP1 = places_BP.clamp(0, count - 1)[..., None]
    return (1 - (at_BP1 - torch.arange(count, device=at_BP1.device)).abs()).clamp_min(0)


def _interpolate(values_BXY: Tensor, weights_BRX: Tensor, weights_BCY: Tensor) -> Tensor:
    """Return sum_xy weights[r, x] weights[c, y] values[x, y], [B, R * C]."""
    # Sums, not matrix products: those might round to bfloat16 or TF32, and there is nothing to gain.
    by_row_BRY = (weights_BRX[..., None] * values_BXY[:, None]).sum(2)
    return (weights_BCY[:, None] * by_row_BRY[:, :, None]).sum(3).flatten(1)
