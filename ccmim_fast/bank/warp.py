"""Between the patches of a crop and the map of its image, bilinear both ways.

A map is the whole image in cells, whatever its size. A cell holds a score: the log of how much more than its share of
[CLS]'s attention a patch there got, so 0 is exactly its share. A cell that no crop has covered yet holds 0 too.
"""

# B batch, R x C patches of a crop (L of them), G cells per side of a map, P places along one axis

import torch
from torch import Tensor


def read(maps_BGG: Tensor, boxes_B4: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scores at the centres of a crop's patches.

    Between the centres of four cells a score is interpolated, beyond the outermost centres the nearest counts. For the
    crop that is the whole image, with as many patches as cells, scores are the cells themselves.

    Args:
        maps_BGG: float; float16 in a run.
        boxes_B4: float64, the crops as in `Batch`.
        grid: R, C.

    Returns:
        scores [B, L] and, of their interpolation, the share that came from cells with a score [B, L], 0 .. 1; float32
        (float64 of float64 maps).
    """
    dtype = torch.promote_types(maps_BGG.dtype, torch.float32)
    y_BR, x_BC = (_in_image(boxes_B4, axis, patches) for axis, patches in enumerate(grid))
    cells = maps_BGG.shape[1]
    weights = _hats(y_BR * cells - 0.5, cells).to(dtype), _hats(x_BC * cells - 0.5, cells).to(dtype)
    known_BGG = (maps_BGG != 0).to(dtype)
    return _interpolate(maps_BGG.to(dtype), *weights), _interpolate(known_BGG, *weights)


def update(maps_BGG: Tensor, boxes_B4: Tensor, scores_BL: Tensor, grid: tuple[int, int], momentum: float) -> Tensor:
    """The maps after a crop's patches got these scores; a new tensor like `maps_BGG`.

    A cell whose centre lies in the crop becomes momentum * cell + (1 - momentum) * score, or the score alone where it
    had none; the score is interpolated between the centres of four patches, and beyond the outermost ones it is the
    nearest's. Other cells stay, and all do where some score of the crop is not finite.

    Args:
        maps_BGG, boxes_B4, grid: as in `read`.
        scores_BL: float32 (float64 for float64 maps).
        momentum: 0 .. 1.
    """
    dtype, cells = torch.promote_types(maps_BGG.dtype, torch.float32), maps_BGG.shape[1]
    (y_BG, rows), (x_BG, columns) = ((_in_crop(boxes_B4, axis, cells), count) for axis, count in enumerate(grid))
    weights = _hats(y_BG * rows - 0.5, rows).to(dtype), _hats(x_BG * columns - 0.5, columns).to(dtype)
    seen_BGG = _interpolate(scores_BL.to(dtype).unflatten(1, grid), *weights).unflatten(1, (cells, cells))
    before_BGG = maps_BGG.to(dtype)
    mixed_BGG = torch.where(before_BGG == 0, seen_BGG, momentum * before_BGG + (1 - momentum) * seen_BGG)
    covered_BGG = _inside(y_BG)[:, :, None] & _inside(x_BG)[:, None, :]
    after_BGG = torch.where(mixed_BGG.isfinite(), mixed_BGG, before_BGG)
    return torch.where(covered_BGG, after_BGG.to(maps_BGG.dtype), maps_BGG)


def _in_image(boxes_B4: Tensor, axis: int, patches: int) -> Tensor:
    """Where the patches' centres lie in the image [B, patches], 0 .. 1."""
    start_B1, extent_B1 = boxes_B4[:, axis, None], boxes_B4[:, axis + 2, None]
    return start_B1 + extent_B1 * _centres(patches, boxes_B4)


def _in_crop(boxes_B4: Tensor, axis: int, cells: int) -> Tensor:
    """Where the cells' centres lie in the crop [B, cells]; 0 .. 1 is inside."""
    start_B1, extent_B1 = boxes_B4[:, axis, None], boxes_B4[:, axis + 2, None]
    return (_centres(cells, boxes_B4) - start_B1) / extent_B1


def _centres(count: int, like: Tensor) -> Tensor:
    return (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count


def _inside(places_BP: Tensor) -> Tensor:
    return (places_BP >= 0) & (places_BP <= 1)


def _hats(places_BP: Tensor, count: int) -> Tensor:
    """Weights of linear interpolation at `places` between 0, 1, .. count - 1, [B, P, count]; clamped at both ends."""
    at_BP1 = places_BP.clamp(0, count - 1)[..., None]
    return (1 - (at_BP1 - torch.arange(count, device=at_BP1.device)).abs()).clamp_min(0)


def _interpolate(values_BXY: Tensor, weights_BRX: Tensor, weights_BCY: Tensor) -> Tensor:
    """sum_xy weights[r, x] weights[c, y] values[x, y], [B, R * C]."""
    # Sums, not matrix products: those might round to bfloat16 or TF32, and there is nothing to gain.
    by_row_BRY = (weights_BRX[..., None] * values_BXY[:, None]).sum(2)
    return (weights_BCY[:, None] * by_row_BRY[:, :, None]).sum(3).flatten(1)
