"""The op `sample_partition` divides each image's patches into a visible and a masked set, a `Partition`."""

# B batch, L patches, K visible, M masked (K + M = L), T of them for the teacher, R candidate blocks

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ccmim_kernels.dispatch import choosable, operator, uses_triton, widened
from ccmim_kernels.philox import (
    STREAM_BLOCK,
    STREAM_TEACHER,
    keyed_bits,
    keyed_gumbel,
    keyed_uniform,
    per_sample,
    to_unit,
)

STRATEGIES = ("random", "block", "importance", "importance_sampling")
NOISES = ("gumbel", "uniform")

# Rectangles drawn per image; at 14 x 14 patches and ratio 0.75 twelve suffice on average. What 64 leave uncovered is
# filled in patch order, so that the count is exact.
BLOCKS = 64
LOG_ASPECT = math.log(1 / 0.3)  # BEiT: aspect ratio log-uniform in 0.3 .. 1 / 0.3


class Partition(NamedTuple):
    """This class is one split per image, all sets in patch order."""

    ids_visible_BK: Tensor  # int64 patch indices, ascending
    ids_masked_BM: Tensor  # int64 patch indices, ascending
    ids_restore_BL: Tensor  # int64; row of patch i in the concatenation of both sets
    mask_BL: Tensor  # bool, True where masked
    nan_B: Tensor  # bool, True where a score of the image was NaN: NaN then counted as the largest score
    ids_teacher_BT: Tensor  # int64 indices, ascending, of what the teacher sees of them; all: `ids_masked_BM`


def partition_from_mask(mask_BL: Tensor, keep: int, ids_teacher_BT: Tensor | None = None) -> Partition:
    """Return the partition of a mask (bool, True = masked) in which each row leaves exactly `keep` patches visible.

    The teacher sees `ids_teacher_BT`, as `teacher_ids` returns them; None: all masked patches.
    """
    shuffle_BL = mask_BL.to(torch.uint8).argsort(dim=1, stable=True)
    visible_BK, masked_BM = shuffle_BL[:, :keep], shuffle_BL[:, keep:]
    nan_B = torch.zeros(len(mask_BL), dtype=torch.bool, device=mask_BL.device)
    teacher_BT = masked_BM if ids_teacher_BT is None else ids_teacher_BT
    return Partition(visible_BK, masked_BM, shuffle_BL.argsort(dim=1), mask_BL, nan_B, teacher_BT)


def partition_by_keys(keys_BL: Tensor, keep: int) -> Partition:
    """Mask the L - keep largest keys of each row; NaN is the largest, equal keys go by patch index, lowest first."""
    order_BL = keys_BL.argsort(dim=1, descending=True, stable=True)
    masked = keys_BL.shape[1] - keep
    mask_BL = torch.zeros_like(keys_BL, dtype=torch.bool).scatter_(1, order_BL[:, :masked], True)
    *parts, _, ids_teacher_BT = partition_from_mask(mask_BL, keep)
    return Partition(*parts, keys_BL.isnan().any(1), ids_teacher_BT)


def teacher_ids(mask_BL: Tensor, ids_B: Tensor, seed: int, epoch: int | Tensor, teacher: int) -> Tensor:
    """Draw `teacher` masked patches (True in the mask) of each image uniformly: [B, T] int64, ascending.

    The draw is a function of (seed, epoch, sample id, patch), from a stream of its own; arguments as of
    `sample_partition`.
    """
    noise_BL = keyed_uniform(seed, epoch, ids_B, mask_BL.shape[1], STREAM_TEACHER).float()
    order_BL = noise_BL.masked_fill(~mask_BL, -1).argsort(dim=1, descending=True, stable=True)
    return order_BL[:, :teacher].sort(dim=1).values


def importance_keys(
    logits_BL: Tensor, ids_B: Tensor, seed: int, epoch: int | Tensor, noise: str | None, temperature: float
) -> Tensor:
    """Return log s / T, plus Gumbel noise (sampling without replacement), minus U(0, 1) (authors' code), or alone."""
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
    """Express block-wise masking (BEiT) as keys [B, L] float32: patches of earlier blocks have larger keys.

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


def sample_partition_reference(
    logits_BL, ids_B, *, keep, grid, seed, epoch, strategy, noise, temperature, block_min, teacher
) -> Partition:
    """Specify `sample_partition`, whose arguments these are, in plain PyTorch."""
    patches = grid[0] * grid[1]
    if strategy == "random":
        keys_BL = keyed_uniform(seed, epoch, ids_B, patches).float()
    elif strategy == "block":
        keys_BL = block_keys(ids_B, seed, epoch, patches - keep, grid, block_min)
    else:
        drawn = noise if strategy == "importance_sampling" else None
        keys_BL = importance_keys(logits_BL, ids_B, seed, epoch, drawn, temperature)
    partition = partition_by_keys(keys_BL, keep)
    if teacher == patches - keep:
        return partition
    *parts, _ = partition
    return Partition(*parts, teacher_ids(partition.mask_BL, ids_B, seed, epoch, teacher))


@choosable("sample_partition")
def sample_partition(
    logits_BL: Tensor | None,
    ids_B: Tensor,
    *,
    keep: int,
    grid: tuple[int, int],
    seed: int,
    epoch: int | Tensor,
    strategy: str = "importance_sampling",
    noise: str = "gumbel",
    temperature: float = 1.0,
    block_min: int = 16,
    teacher: int | None = None,
    kernels: str = "auto",
) -> Partition:
    """Divide each image's patches into `keep` visible and L - keep masked ones (paper, section 3.2 and Table 5).

    Nothing of the result has a gradient. Every strategy is one key per patch; the largest keys are masked, equal
    keys by patch index:

    - `random`: keys ~ U(0, 1) (MAE).
    - `block`: block-wise masking (BEiT), blocks of at least `block_min` patches.
    - `importance`: keys = log s, the largest scores are masked.
    - `importance_sampling`: keys = log s / T + Gumbel noise, that is, sampling without replacement in proportion to
      s^(1/T) (Gumbel top-k). With `noise="uniform"` keys = log s / T - U(0, 1), as in the authors' code.

    The noise is a function of (seed, epoch, sample id, patch): no mask depends on the batch it comes in, nor does the
    draw of what the teacher sees of it, which is uniform.

    Args:
        logits_BL: [B, L] float, log s up to a constant per row (Eq. 4 before its softmax); None for `random`, `block`.
        ids_B: [B] int64 sample ids.
        keep: number of visible patches, 1 .. L - 1.
        grid: rows and columns of patches, rows * columns = L.
        seed, epoch: 0 .. 2**32 - 1; the epoch as a number, or as int64 on the device of `ids_B`, one for all or [B].
        teacher: number of masked patches that the teacher sees, 1 .. L - keep; None: all.
        kernels: `auto`, `triton` or `reference`, see `ccmim_kernels.dispatch`; the partition is the same, bit for bit.
    """
    patches = grid[0] * grid[1]
    _check_sampling(patches, keep, teacher, strategy, noise, temperature, seed=seed, epoch=epoch)
    if ids_B.ndim != 1:
        raise ValueError(f"ids are {list(ids_B.shape)}, expected [{len(ids_B)}]")
    if isinstance(epoch, Tensor) and epoch.shape not in ((), ids_B.shape):
        raise ValueError(f"epoch is {list(epoch.shape)}, expected [] or {list(ids_B.shape)}")
    if not strategy.startswith("importance"):
        logits_BL = None
    elif logits_BL is None:
        raise ValueError(f"strategy={strategy} needs logits")
    elif tuple(logits_BL.shape) != (len(ids_B), patches):
        raise ValueError(f"logits are {list(logits_BL.shape)}, expected [{len(ids_B)}, {patches}]")
    else:
        logits_BL = widened(logits_BL.detach())
    ids_B, epochs_B = ids_B.to(torch.int64), per_sample(epoch, ids_B)
    how = {"keep": keep, "seed": seed, "epoch": epochs_B, "strategy": strategy, "noise": noise}
    # torch.compile 2.7 traces no |= of dictionaries
    how = {**how, "temperature": temperature, "block_min": block_min, "teacher": teacher or patches - keep}
    if not uses_triton(kernels, "sample_partition", ids_B.device, logits_BL):
        return sample_partition_reference(logits_BL, ids_B, grid=grid, **how)
    *parts, drawn = _sample_partition(logits_BL, ids_B, rows=grid[0], columns=grid[1], **how)
    return Partition(*parts, parts[1] if teacher in (None, patches - keep) else drawn)


def _check_sampling(
    patches: int,
    keep: int,
    teacher: int | None,
    strategy: str,
    noise: str,
    temperature: float,
    **words: int | Tensor,
) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} must be one of {', '.join(STRATEGIES)}")
    if noise not in NOISES:
        raise ValueError(f"noise={noise!r} must be one of {', '.join(NOISES)}")
    if not 1 <= keep < patches:
        raise ValueError(f"keep={keep} must be in 1..{patches - 1}")
    if teacher is not None and not 1 <= teacher <= patches - keep:
        raise ValueError(f"teacher={teacher} must be in 1..{patches - keep}, the masked patches, or None")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be greater than 0")
    for name, word in words.items():
        # A tensor's value is not looked at: that would wait for the device.
        if not isinstance(word, Tensor) and not 0 <= word < 2**32:
            raise ValueError(f"{name}={word} must be in 0..{2**32 - 1}")


@operator("sample_partition")
def _sample_partition(
    logits: Tensor | None,
    ids: Tensor,
    rows: int,
    columns: int,
    keep: int,
    seed: int,
    epoch: Tensor,
    strategy: str,
    noise: str,
    temperature: float,
    block_min: int,
    teacher: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_partition(ids, rows * columns, keep, teacher, torch.bool)


def empty_partition(ids_B: Tensor, patches: int, keep: int, teacher: int, flags: torch.dtype) -> tuple[Tensor, ...]:
    """Return the tensors of a `Partition`, unwritten; mask and NaN flag in the dtype `flags`.

    The teacher's indices have no elements where they are those of all masked patches.
    """
    batch = ids_B.shape[0]
    own = (0,) if teacher == patches - keep else (batch, teacher)
    shapes = ((batch, keep), (batch, patches - keep), (batch, patches), own)
    *indices, ids_teacher_BT = (ids_B.new_empty(shape, dtype=torch.int64) for shape in shapes)
    mask_BL, nan_B = (ids_B.new_empty(shape, dtype=flags) for shape in ((batch, patches), (batch,)))
    return *indices, mask_BL, nan_B, ids_teacher_BT
