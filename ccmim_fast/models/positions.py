"""Fixed 2-D sine-cosine positions (MAE; Vaswani et al. 2017 along each axis)."""

# S positions, D width

import torch
from torch import Tensor


def _axis(dim: int, coordinate_S: Tensor) -> Tensor:
    """[S, dim] float64: sines, then cosines, of coordinate / 10000^(2i / dim)."""
    frequency = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = coordinate_S[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_positions(dim: int, grid: tuple[int, int], prefix: int) -> Tensor:
    """Positions [prefix + rows * columns, dim] float32; zeros for the prefix tokens.

    The first half of the channels encodes the column, the second the row, as in MAE's published checkpoints.

    Raises:
        ValueError: `dim` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim={dim} must be a multiple of 4")
    rows, columns = grid
    row_S = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column_S = torch.arange(columns, dtype=torch.float64).repeat(rows)
    table = torch.cat([_axis(dim // 2, column_S), _axis(dim // 2, row_S)], dim=1)
    return torch.cat([torch.zeros(prefix, dim), table.float()])
