"""Block-wise masking (BEiT) is expressed as one key per patch, as every strategy of `sample_partition` is."""

# B batch, L patches, R candidate blocks

import math

import torch
from torch import Tensor

from ccmim_kernels.philox import STREAM_BLOCK, keyed_bits, to_unit

# Rectangles drawn per image; at 14 x 14 patches and ratio 0.75 twelve suffice on average. What 64 leave uncovered is
# filled in patch order, so that the count is exact.
BLOCKS = 64
LOG_ASPECT = math.log(1 / 0.3)  # BEiT: aspect ratio log-uniform in 0.3 .. 1 / 0.3


def block_keys(
    ids_B: Tensor, seed: int, epoch: int | Tensor, masked: int, grid: tuple[int, int], block_min: int
) -> Tensor:
    """Express block-wise masking as keys [B, L] float32: patches of earlier blocks have larger keys.

    Block r of an image has an area uniform in block_min .. masked patches, a log-uniform aspect ratio and a uniform
    place; all are functions of (seed, epoch, sample id, r). Blocks are masked whole, in their order, but for the last,
    of which the first patches in patch order are taken.
    """
    rows, columns = grid
    smallest = min(block_min, masked)
    draws = keyed_bits(seed, epoch, ids_B, BLOCKS, STREAM_BLOCK)
    area_u, aspect_u, row_u, column_u = (to_unit(bits_BR) for bits_BR in draws)

    area_BR = smallest + area_u * (masked - smallest)
    aspect_BR = torch.exp((2 * aspect_u - 1) * LOG_ASPECT)
    height_BR = ((area_BR * aspect_BR).sqrt() + 0.5).floor()
    # Where the grid is too narrow for the aspect ratio, the block grows in height instead: never fewer patches.
    height_BR = torch.minimum(torch.maximum(height_BR, (area_BR / columns).ceil()), torch.full_like(area_BR, rows))
    width_BR = (area_BR / height_BR).ceil().clamp(max=columns)
    top_BR = (row_u * (rows - height_BR + 1)).floor()
    left_BR = (column_u * (columns - width_BR + 1)).floor()

    row_L = torch.arange(rows, device=ids_B.device).repeat_interleave(columns)
    column_L = torch.arange(columns, device=ids_B.device).repeat(rows)
    inside_BRL = (
        (row_L >= top_BR[..., None])
        & (row_L < (top_BR + height_BR)[..., None])
        & (column_L >= left_BR[..., None])
        & (column_L < (left_BR + width_BR)[..., None])
    )
    # argmax gives the first True; a patch in no block comes after all blocks.
    first_BL = torch.where(inside_BRL.any(1), inside_BRL.to(torch.uint8).argmax(1), BLOCKS)
    return -first_BL.float()
