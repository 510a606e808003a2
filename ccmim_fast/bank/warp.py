"""Warps between the patches of a crop and the map of its image, bilinear both ways.

A map covers the whole image with its cells, whatever the image's size. A cell holds a score: the log of how much more
than its share of [CLS]'s attention a patch there got, so 0 is exactly its share. A cell that no crop has covered yet
holds 0 too.
"""

# B batch, R x C patches of a crop (L of them), G cells per side of a map, P places along one axis

import torch
from torch import Tensor


def read(maps_BGG: Tensor, boxes_B4: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
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


def update(maps_BGG: Tensor, boxes_B4: Tensor, scores_BL: Tensor, grid: tuple[int, int], momentum: float) -> Tensor:
    """Return the maps after a crop's patches got these scores; a new tensor like `maps_BGG`.

    A cell whose centre lies in the crop becomes momentum * cell + (1 - momentum) * score, or the score alone where it
    had none. The score is interpolated between the centres of four patches; beyond the outermost ones the nearest
    counts. Other cells stay, and all cells stay where some score of the crop is not finite.

    Args:
        maps_BGG, boxes_B4, grid: as in `read`.
        scores_BL: float32 (float64 for float64 maps).
        momentum: 0 .. 1.
    """
    cells, before_BGG = maps_BGG.shape[1], maps_BGG.to(torch.promote_types(maps_BGG.dtype, torch.float32))
    weights, inside = [], []
    for axis, patches in enumerate(grid):
        start_B1, extent_B1 = boxes_B4[:, axis, None], boxes_B4[:, axis + 2, None]
        in_crop_BG = (_centres(cells, boxes_B4) - start_B1) / extent_B1  # 0 .. 1 is inside
        weights.append(_hats(in_crop_BG * patches - 0.5, patches).to(before_BGG.dtype))
        inside.append((in_crop_BG >= 0) & (in_crop_BG <= 1))
    seen_BGG = _interpolate(scores_BL.to(before_BGG.dtype).unflatten(1, grid), *weights).unflatten(1, (cells, cells))
    mixed_BGG = torch.where(before_BGG == 0, seen_BGG, momentum * before_BGG + (1 - momentum) * seen_BGG)
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
