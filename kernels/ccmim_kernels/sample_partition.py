"""The op `sample_partition` divides each image's patches into a visible and a masked set, a `Partition`."""

# B batch, L patches, K visible (H of them hints), M masked (K + M = L; A by importance, T for the teacher)

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ccmim_kernels.block_keys import block_keys
from ccmim_kernels.dispatch import choosable, operator, uses_triton, widened
from ccmim_kernels.philox import (
    STREAM_MASK,
    STREAM_TEACHER,
    keyed_bits,
    keyed_gumbel,
    keyed_uniform,
    per_sample,
    to_unit,
)

STRATEGIES = ("random", "block", "importance", "importance_sampling")
NOISES = ("gumbel", "uniform")


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


def partition_by_keys(keys_BL: Tensor, keep: int, nan_B: Tensor) -> Partition:
    """Mask the L - keep largest keys of each row; NaN is the largest, equal keys go by patch index, lowest first."""
    order_BL = keys_BL.argsort(dim=1, descending=True, stable=True)
    masked = keys_BL.shape[1] - keep
    mask_BL = torch.zeros_like(keys_BL, dtype=torch.bool).scatter_(1, order_BL[:, :masked], True)
    *parts, _, ids_teacher_BT = partition_from_mask(mask_BL, keep)
    return Partition(*parts, nan_B, ids_teacher_BT)


def teacher_ids(mask_BL: Tensor, ids_B: Tensor, seed: int, epoch: int | Tensor, teacher: int) -> Tensor:
    """Draw `teacher` masked patches (True in the mask) of each image uniformly: [B, T] int64, ascending.

    The draw is a function of (seed, epoch, sample id, patch), from a stream of its own; arguments as of
    `sample_partition`.
    """
    noise_BL = keyed_uniform(seed, epoch, ids_B, mask_BL.shape[1], STREAM_TEACHER).float()
    order_BL = noise_BL.masked_fill(~mask_BL, -1).argsort(dim=1, descending=True, stable=True)
    return order_BL[:, :teacher].sort(dim=1).values


def scheduled(first: int, last: int, done: int | Tensor, span: int) -> int | Tensor:
    """Return the whole number that is `done` of `span` epochs on the straight way from `first` to `last`, rounded."""
    return (first * (span - done) + last * done + span // 2) // span


def inverse_temperature(first: float, last: float, epochs_B: Tensor, span: int) -> float | Tensor:
    """Return 1 / T of T on the straight way from `first` to `last`, as `scheduled`: one number, or [B, 1] float32."""
    if first == last:
        return 1 / first
    done_B = epochs_B.clamp(max=span)
    # In float64 from numbers of float32, as kernels get them.
    inverse_B = torch.full_like(done_B, 1 / first, dtype=torch.float32).double()
    growth_B = torch.full_like(done_B, last / first - 1, dtype=torch.float32).double()
    return (inverse_B / (1 + growth_B * (done_B.double() / span))).float()[:, None]


def importance_keys(
    logits_BL: Tensor, ids_B: Tensor, seed: int, epoch: int | Tensor, noise: str | None, inverse: float | Tensor
) -> Tensor:
    """Return log s / T, plus Gumbel noise (sampling without replacement), minus U(0, 1) (authors' code), or alone.

    `inverse` is 1 / T, one for all or [B, 1].
    """
    # Times the inverse: dividing by a number is rounded differently on CUDA and on CPUs.
    keys_BL = logits_BL * inverse
    patches = keys_BL.shape[1]
    if noise == "gumbel":
        return keys_BL + keyed_gumbel(seed, epoch, ids_B, patches).to(keys_BL.dtype)
    if noise == "uniform":
        return keys_BL - keyed_uniform(seed, epoch, ids_B, patches).to(keys_BL.dtype)
    return keys_BL


def mixed_keys(
    keys_BL: Tensor, ids_B: Tensor, seed: int, epoch: int | Tensor, important_B1: Tensor, hints_B1: Tensor
) -> Tensor:
    """Return keys [B, L] float32 that mask A patches by importance, none that is a hint, and others at random.

    The A largest of `keys_BL` are drawn. H of them, uniformly, are hints: they get the smallest key, and the next
    largest are drawn in their places. What is drawn gets the largest key, and the others uniform noise between both.
    Hints and noise are words of their own in the masks' stream.
    """
    _, *words = keyed_bits(seed, epoch, ids_B, keys_BL.shape[1], STREAM_MASK)
    noise_BL, reveal_BL = (to_unit(bits_BL).float() for bits_BL in words[:2])
    drawn_BL = _largest(keys_BL, important_B1)
    hint_BL = _largest(reveal_BL.masked_fill(~drawn_BL, -1), hints_B1)
    first_BL = _largest(keys_BL, important_B1 + hints_B1) & ~hint_BL
    return noise_BL.masked_fill(first_BL, 2).masked_fill(hint_BL, -1)


def _largest(keys_BL: Tensor, count_B1: Tensor) -> Tensor:
    """Return which are the largest keys of a row, bool; in the order of `partition_by_keys`."""
    return keys_BL.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < count_B1


def sample_partition_reference(
    logits_BL, ids_B, *, keep, grid, seed, epoch, strategy, noise, block_min, teacher, epochs, **ways
) -> Partition:
    """Specify `sample_partition`, whose arguments these are, in plain PyTorch; `ways` are the pairs by their names."""
    patches, span = grid[0] * grid[1], max(1, epochs - 1)
    if strategy == "random":
        keys_BL = keyed_uniform(seed, epoch, ids_B, patches).float()
    elif strategy == "block":
        keys_BL = block_keys(ids_B, seed, epoch, patches - keep, grid, block_min)
    else:
        drawn = noise if strategy == "importance_sampling" else None
        inverse = inverse_temperature(*ways["temperature"], epoch, span)
        keys_BL = importance_keys(logits_BL, ids_B, seed, epoch, drawn, inverse)
    nan_B = keys_BL.isnan().any(1)
    if is_mixed(strategy, patches - keep, ways["important"], ways["hints"]):
        done_B1 = epoch.clamp(max=span)[:, None]
        counts = (scheduled(*ways[name], done_B1, span) for name in ("important", "hints"))
        keys_BL = mixed_keys(keys_BL, ids_B, seed, epoch, *counts)
    partition = partition_by_keys(keys_BL, keep, nan_B)
    if teacher == patches - keep:
        return partition
    *parts, _ = partition
    return Partition(*parts, teacher_ids(partition.mask_BL, ids_B, seed, epoch, teacher))


def is_mixed(strategy: str, masked: int, important: Sequence[int], hints: Sequence[int]) -> bool:
    """Tell whether masks are not those of the keys alone: not all by importance, or with hints."""
    return strategy.startswith("importance") and (min(important) < masked or max(hints) > 0)


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
    temperature: float | tuple[float, float] = 1.0,
    block_min: int = 16,
    teacher: int | None = None,
    important: int | tuple[int, int] | None = None,
    hints: int | tuple[int, int] = 0,
    epochs: int = 1,
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

    By importance A patches are masked, the other M - A uniformly. Of the A largest keys H, drawn uniformly, are hints:
    they stay visible, and the next largest take their places. T, A and H may be pairs, which they go from and to in
    equal steps, A and H rounded, from epoch 0 to the last of `epochs`; later epochs are as that.

    The noise is a function of (seed, epoch, sample id, patch): no mask depends on the batch it comes in, nor does the
    draw of what the teacher sees of it, which is uniform.

    Args:
        logits_BL: [B, L] float, log s up to a constant per row (Eq. 4 before its softmax); None for `random`, `block`.
        ids_B: [B] int64 sample ids.
        keep: number of visible patches, 1 .. L - 1.
        grid: rows and columns of patches, rows * columns = L.
        seed, epoch: 0 .. 2**32 - 1; the epoch as a number, or as int64 on the device of `ids_B`, one for all or [B].
        temperature, important, hints: T; A, 0 .. L - keep, None: all; H, 0 .. min(A, keep). For importance alone.
        teacher: number of masked patches that the teacher sees, 1 .. L - keep; None: all.
        kernels: `auto`, `triton` or `reference`, see `ccmim_kernels.dispatch`; the partition is the same, bit for bit.
    """
    patches = grid[0] * grid[1]
    ways = {"temperature": temperature, "important": patches - keep if important is None else important, "hints": hints}
    ways = {name: way if isinstance(way, tuple) else (way, way) for name, way in ways.items()}
    _check_sampling(patches, keep, teacher, strategy, noise, epochs, **ways, seed=seed, epoch=epoch)
    logits_BL = _checked_logits(logits_BL, ids_B, epoch, strategy, patches)
    ids_B, epochs_B = ids_B.to(torch.int64), per_sample(epoch, ids_B)
    how = {"keep": keep, "seed": seed, "epoch": epochs_B, "strategy": strategy, "noise": noise}
    # torch.compile 2.7 traces no |= of dictionaries
    how = {**how, "block_min": block_min, "teacher": teacher or patches - keep, **ways, "epochs": epochs}
    if not uses_triton(kernels, "sample_partition", ids_B.device, logits_BL):
        return sample_partition_reference(logits_BL, ids_B, grid=grid, **how)
    *parts, drawn = _sample_partition(logits_BL, ids_B, rows=grid[0], columns=grid[1], **how)
    return Partition(*parts, parts[1] if teacher in (None, patches - keep) else drawn)


def _checked_logits(
    logits_BL: Tensor | None, ids_B: Tensor, epoch: int | Tensor, strategy: str, patches: int
) -> Tensor | None:
    if ids_B.ndim != 1:
        raise ValueError(f"ids are {list(ids_B.shape)}, expected [{len(ids_B)}]")
    if isinstance(epoch, Tensor) and epoch.shape not in ((), ids_B.shape):
        raise ValueError(f"epoch is {list(epoch.shape)}, expected [] or {list(ids_B.shape)}")
    if not strategy.startswith("importance"):
        return None
    if logits_BL is None:
        raise ValueError(f"strategy={strategy} needs logits")
    if tuple(logits_BL.shape) != (len(ids_B), patches):
        raise ValueError(f"logits are {list(logits_BL.shape)}, expected [{len(ids_B)}, {patches}]")
    return widened(logits_BL.detach())


def _check_sampling(
    patches: int,
    keep: int,
    teacher: int | None,
    strategy: str,
    noise: str,
    epochs: int,
    temperature: tuple[float, float],
    important: tuple[int, int],
    hints: tuple[int, int],
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
    if epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1")
    for number, drawn, revealed in zip(temperature, important, hints):
        if not number > 0:
            raise ValueError(f"temperature={number} must be greater than 0")
        if not 0 <= drawn <= patches - keep:
            raise ValueError(f"important={drawn} must be in 0..{patches - keep}, the masked patches")
        if not 0 <= revealed <= min(drawn, keep):
            raise ValueError(f"hints={revealed} must be in 0..{min(drawn, keep)}, of {drawn} patches by importance")
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
    block_min: int,
    teacher: int,
    temperature: list[float],
    important: list[int],
    hints: list[int],
    epochs: int,
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
