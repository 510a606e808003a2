"""Keys and partition in plain PyTorch: the specification of `sample_partition`."""

# B batch, L patches, R candidate blocks

import math

import torch
from torch import Tensor

from ccmim_kernels.partition import Partition, partition_from_mask
from ccmim_kernels.philox import (
    STREAM_BLOCK,
    keyed_gumbel,
    keyed_uniform,
    per_sample,
    philox_4x32,
    stream_key,
    to_unit,
)

# Rectangles drawn per image; at 14 x 14 patches and ratio 0.75 twelve suffice on average. What 64 leave uncovered is
# filled in patch order, so that the count is exact.
BLOCKS = 64
_LOG_ASPECT = math.log(1 / 0.3)  # BEiT: aspect ratio log-uniform in 0.3 .. 1 / 0.3


def partition_by_keys(keys_BL: Tensor, keep: int) -> Partition:
    """Mask the L - keep largest keys of each row; NaN is the largest, equal keys go by patch index, lowest first."""
    order_BL = keys_BL.argsort(dim=1, descending=True, stable=True)
    masked = keys_BL.shape[1] - keep
    mask_BL = torch.zeros_like(keys_BL, dtype=torch.bool).scatter_(1, order_BL[:, :masked], True)
    *parts, _ = partition_from_mask(mask_BL, keep)
    return Partition(*parts, keys_BL.isnan().any(1))


def importance_keys(
    logits_BL: Tensor, ids_B: Tensor, seed: int, epoch: int | Tensor, noise: str | None, temperature: float
) -> Tensor:
    """log s / T, plus Gumbel noise (sampling without replacement), minus U(0, 1) (authors' code), or alone."""
    # Times the inverse: dividing by a number is rounded differently on CUDA and on CPUs.
    keys_BL = logits_BL * (1 / temperature)
    patches = keys_BL.shape[1]
    if noise == "gumbel":
        return keys_BL + keyed_gumbel(seed, epoch, ids_B, patches).to(keys_BL.dtype)
    if noise == "uniform":
        return keys_BL - keyed_uniform(seed, epoch, ids_B, patches).to(keys_BL.dtype)
    return keys_BL


def block_keys(
    ids_B: Tensor, seed: int, epoch: int | Tensor, masked: int, grid: tuple[int, int], block_min: int
) -> Tensor:
    """Block-wise masking (BEiT) as keys [B, L] float32: patches of earlier blocks have larger keys.

    Block r of an image has an area uniform in block_min .. masked patches, a log-uniform aspect ratio and a uniform
    place; all are functions of (seed, epoch, sample id, r). Blocks are masked whole, in their order, but for the last,
    of which the first patches in patch order are taken.
    """
    rows, columns = grid
    smallest = min(block_min, masked)
    block_R = torch.arange(BLOCKS, device=ids_B.device)[None]
    id_B1 = ids_B.to(torch.int64)[:, None]
    key = stream_key(seed, STREAM_BLOCK)
    epoch_B1 = per_sample(epoch, ids_B)[:, None]
    draws = philox_4x32(key, block_R, id_B1 & 0xFFFFFFFF, (id_B1 >> 32) & 0xFFFFFFFF, epoch_B1)
    area_u, aspect_u, row_u, column_u = (to_unit(bits_BR) for bits_BR in draws)

    area_BR = smallest + area_u * (masked - smallest)
    aspect_BR = torch.exp((2 * aspect_u - 1) * _LOG_ASPECT)
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


def sample_partition(
    logits_BL: Tensor | None,
    ids_B: Tensor,
    *,
    patches: int,
    keep: int,
    seed: int,
    epoch: int | Tensor,
    strategy: str,
    noise: str,
    temperature: float,
    grid: tuple[int, int],
    block_min: int,
) -> Partition:
    """See `op.sample_partition`."""
    if strategy == "random":
        keys_BL = keyed_uniform(seed, epoch, ids_B, patches).float()
    elif strategy == "block":
        keys_BL = block_keys(ids_B, seed, epoch, patches - keep, grid, block_min)
    else:
        drawn = noise if strategy == "importance_sampling" else None
        keys_BL = importance_keys(logits_BL, ids_B, seed, epoch, drawn, temperature)
    return partition_by_keys(keys_BL, keep)
