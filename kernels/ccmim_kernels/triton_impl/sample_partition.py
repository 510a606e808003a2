"""This kernel of `sample_partition` makes keys, selects and divides in one launch.

The K-th largest key is found by bisection of its bits (32 counts over the row, no sort), ranks by a prefix sum.
"""

# B batch, L patches, K visible, M masked, T of them for the teacher, R candidate blocks

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.block_keys import BLOCKS, LOG_ASPECT
from ccmim_kernels.philox import STREAM_BLOCK, STREAM_MASK, STREAM_TEACHER
from ccmim_kernels.sample_partition import empty_partition, is_mixed
from ccmim_kernels.triton_impl.launch import ROW_SIZES, fitting, launch

_INTEGERS = ["L", "keep", "has_logits", "seed", "stream", "rows", "columns", "block_min", "teacher"]
_INTEGERS += ["span", "important", "last_important", "hints", "last_hints"]
_BLOCKS, _LOG_ASPECT, _STREAM_TEACHER = tl.constexpr(BLOCKS), tl.constexpr(LOG_ASPECT), tl.constexpr(STREAM_TEACHER)


@triton.jit
def draw_bits(seed, stream, epoch, sample, counter):
    """Draw four words of Philox-4x32 for each `counter` (int32) of one sample, as `philox.keyed_bits`."""
    key = (stream.to(tl.int64) << 32) | (seed.to(tl.int64) & 0xFFFFFFFF)
    zero = counter & 0
    id_low = (sample & 0xFFFFFFFF).to(tl.int32) + zero
    id_high = (sample >> 32).to(tl.int32) + zero
    return tl.philox(key, counter, id_low, id_high, epoch + zero)


@triton.jit
def unit(bits):
    """Return (bits + 0.5) / 2**32 in float64, exactly."""
    return (bits.to(tl.uint32, bitcast=True).to(tl.float64) + 0.5) * 2.3283064365386963e-10


@triton.jit
def importance_keys(logits, patch, sample, seed, stream, epoch, inverse_temperature, gumbel_weight, uniform_weight):
    """Return logits / T + gumbel_weight * Gumbel noise - uniform_weight * U(0, 1), float32, as the reference does."""
    bits, _, _, _ = draw_bits(seed, stream, epoch, sample, patch)
    uniform = unit(bits)
    gumbel = (-tl.log(-tl.log(uniform))).to(tl.float32)
    return logits * inverse_temperature + (gumbel_weight * gumbel - uniform_weight * uniform.to(tl.float32))


@triton.jit
def select_largest(keys, valid, count):
    """Select the `count` largest valid keys (True); NaN is the largest of all, equal keys go by index, lowest first."""
    # -0.0 equals 0.0, but its bits do not.
    bits = tl.where(keys == 0.0, 0.0, keys).to(tl.int32, bitcast=True)
    # Negative floats have descending bits: flipped, all floats are in the order of their integers, from 0 up.
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    ordered = tl.where(valid, tl.where(keys != keys, 4294967295, ordered), -1)
    # The largest threshold that at least `count` keys reach, bit by bit: the count-th largest key.
    threshold = tl.sum(ordered * 0)
    for step in range(32):
        candidate = threshold + (threshold * 0 + 1 << (31 - step))
        enough = tl.sum((ordered >= candidate).to(tl.int32)) >= count
        threshold = tl.where(enough, candidate, threshold)
    above = ordered > threshold
    equal = (ordered == threshold).to(tl.int32)
    room = count - tl.sum(above.to(tl.int32))
    return above | ((equal > 0) & (tl.cumsum(equal, 0) <= room))


@triton.jit
def warmed(inverse_temperature, growth, done, span):
    """Return 1 / T after `done` (int64) of the `span` epochs in which T grows by the share `growth`, float32."""
    zero = (done * 0).to(tl.float32)  # in the interpreter a float is of 64 bits
    grown = 1 + (zero + growth).to(tl.float64) * (done.to(tl.float64) / span)
    return ((zero + inverse_temperature).to(tl.float64) / grown).to(tl.float32)


@triton.jit
def scheduled(first, last, done, span):
    """Return the whole number that is `done` (int64) of `span` epochs on the way from `first` to `last`, rounded."""
    return ((first * (span - done) + last * done + span // 2) // span).to(tl.int32)


@triton.jit
def mixed_keys(keys, patch, valid, sample, seed, stream, epoch, important, hints):
    """Return keys that mask `important` patches by importance, no hint, and others at random, as the reference."""
    _, noise, reveal, _ = draw_bits(seed, stream, epoch, sample, patch)
    drawn = select_largest(keys, valid, important)
    hint = select_largest(unit(reveal).to(tl.float32), drawn, hints)
    first = select_largest(keys, valid, important + hints)
    return tl.where(hint, -1.0, tl.where(first, 2.0, unit(noise).to(tl.float32)))


@triton.jit
def store_partition(keys, patch, valid, image, L, keep, visible_ptr, masked_ptr, restore_ptr, mask_ptr):
    """Mask the L - keep largest keys of one image, and write its row of a `Partition`; return what is masked."""
    masked = select_largest(keys, valid, L - keep)
    count = masked.to(tl.int32)
    before = tl.cumsum(count, 0) - count
    seen = patch - before
    tl.store(visible_ptr + image * keep + seen, patch.to(tl.int64), mask=valid & (count == 0))
    tl.store(masked_ptr + image * (L - keep) + before, patch.to(tl.int64), mask=valid & (count == 1))
    tl.store(restore_ptr + image * L + patch, tl.where(masked, keep + before, seen).to(tl.int64), mask=valid)
    tl.store(mask_ptr + image * L + patch, count.to(tl.uint8), mask=valid)
    return masked


@triton.jit
def store_teacher(masked, patch, sample, seed, epoch, image, count, teacher_ptr):
    """Write `count` masked patches of one image, drawn uniformly, in patch order."""
    bits, _, _, _ = draw_bits(seed, seed * 0 + _STREAM_TEACHER, epoch, sample, patch)
    taken = select_largest(unit(bits).to(tl.float32), masked, count)
    before = tl.cumsum(taken.to(tl.int32), 0) - taken.to(tl.int32)
    tl.store(teacher_ptr + image * count + before, patch.to(tl.int64), mask=taken)


@triton.jit
def block_keys(patch, sample, seed, stream, epoch, masked, rows, columns, block_min, CHUNK: tl.constexpr):
    """Return minus the index of the first block that covers a patch, as the reference; `stream` is STREAM_BLOCK."""
    smallest = tl.minimum(block_min, masked).to(tl.float64)
    row, column = (patch // columns)[:, None], (patch % columns)[:, None]
    first = patch * 0 + _BLOCKS
    for start in range(0, _BLOCKS, CHUNK):
        block = start + tl.arange(0, CHUNK)
        area_bits, aspect_bits, row_bits, column_bits = draw_bits(seed, stream, epoch, sample, block)
        area = smallest + unit(area_bits) * (masked - smallest)
        aspect = tl.exp((2 * unit(aspect_bits) - 1) * _LOG_ASPECT)
        height = tl.floor(tl.sqrt(area * aspect) + 0.5)
        height = tl.minimum(tl.maximum(height, tl.ceil(area / columns)), rows.to(tl.float64))
        width = tl.minimum(tl.ceil(area / height), columns.to(tl.float64))
        top = tl.floor(unit(row_bits) * (rows - height + 1)).to(tl.int32)
        left = tl.floor(unit(column_bits) * (columns - width + 1)).to(tl.int32)
        bottom, right = top + height.to(tl.int32), left + width.to(tl.int32)
        inside = (row >= top[None, :]) & (row < bottom[None, :])
        inside = inside & (column >= left[None, :]) & (column < right[None, :])
        first = tl.minimum(first, tl.min(tl.where(inside, block[None, :], _BLOCKS), 1))
    return -first.to(tl.float32)


@triton.jit(do_not_specialize=_INTEGERS)
def ccmim_sample_partition_kernel(
    logits_ptr,  # [B, L] fp32; not read where has_logits = 0
    ids_ptr,  # [B] int64 sample ids
    epochs_ptr,  # [B] int64
    visible_ptr,  # [B, K] int64, out
    masked_ptr,  # [B, M] int64, out
    restore_ptr,  # [B, L] int64, out
    mask_ptr,  # [B, L] uint8, out
    nan_ptr,  # [B] uint8, out: 1 where a key is NaN
    teacher_ptr,  # [B, T] int64, out where teacher
    L,
    keep,
    has_logits,
    seed,
    stream,
    inverse_temperature,
    growth,
    gumbel_weight,
    uniform_weight,
    rows,
    columns,
    block_min,
    teacher,
    span,
    important,
    last_important,
    hints,
    last_hints,
    BLOCK_L: tl.constexpr,
    BLOCKWISE: tl.constexpr,
    MIXED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Divide one image; `teacher` is T, or 0 where the teacher sees all that is masked.

    T of the scores grows by the share `growth` in `span` epochs; MIXED: of the masked patches `important` are drawn by
    importance and `hints` stay visible, after `span` epochs `last_*`. Replaces: noise, argsort, scatter, two argsorts,
    gathers; for the teacher noise, argsort, sort; MIXED: six argsorts more. Moves L * (4 + 17) + T * 8 bytes.
    """
    image = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, BLOCK_L)
    valid = patch < L
    sample = tl.load(ids_ptr + image)
    epoch = tl.load(epochs_ptr + image)
    done = tl.minimum(epoch, span)
    epoch = epoch.to(tl.int32)
    if BLOCKWISE:
        keys = block_keys(patch, sample, seed, stream, epoch, L - keep, rows, columns, block_min, CHUNK)
    else:
        logits = tl.load(logits_ptr + image * L + patch, mask=patch < L * has_logits, other=0.0).to(tl.float32)
        inverse = warmed(inverse_temperature, growth, done, span)
        keys = importance_keys(logits, patch, sample, seed, stream, epoch, inverse, gumbel_weight, uniform_weight)
    tl.store(nan_ptr + image, tl.max((valid & (keys != keys)).to(tl.int32)).to(tl.uint8))
    if MIXED:
        drawn = scheduled(important, last_important, done, span)
        revealed = scheduled(hints, last_hints, done, span)
        keys = mixed_keys(keys, patch, valid, sample, seed, stream, epoch, drawn, revealed)
    masked = store_partition(keys, patch, valid, image, L, keep, visible_ptr, masked_ptr, restore_ptr, mask_ptr)
    if teacher > 0:
        store_teacher(masked, patch, sample, seed, epoch, image, teacher, teacher_ptr)


def sample_partition(
    logits_BL,
    ids_B,
    rows,
    columns,
    keep,
    seed,
    epochs_B,
    strategy,
    noise,
    block_min,
    teacher,
    temperature,
    important,
    hints,
    epochs,
) -> tuple[Tensor, ...]:
    """Launch the kernel for the operator's arguments; return the tensors of a `Partition` as `empty_partition`."""
    patches, blockwise, scored = rows * columns, strategy == "block", logits_BL is not None
    size = fitting(ROW_SIZES, patches, "patches")
    out = empty_partition(ids_B, patches, keep, teacher, torch.uint8)
    logits = logits_BL.contiguous() if scored else torch.empty(0, dtype=torch.float32, device=ids_B.device)
    tensors = (logits, ids_B.contiguous(), epochs_B, *out)
    # As int32, by its bits: an argument's type must not depend on its value.
    seed = seed - 2**32 if seed >= 2**31 else seed
    weights = {"gumbel": (1.0, 0.0), "uniform": (0.0, 1.0)}[noise] if strategy == "importance_sampling" else (0.0, 0.0)
    # Inverse temperature and growth, weights of Gumbel and of uniform noise: `random` has U(0, 1) alone.
    scale = (1.0 / temperature[0], temperature[1] / temperature[0] - 1.0)
    terms = (1.0, 0.0, 0.0, -1.0) if strategy == "random" else (*scale, *weights)
    stream = STREAM_BLOCK if blockwise else STREAM_MASK
    mixed = is_mixed(strategy, patches - keep, important, hints)
    block = {"BLOCK_L": size, "BLOCKWISE": blockwise, "MIXED": mixed, "CHUNK": max(2, min(16, 4096 // size))}
    # Keys are 4 a thread; blocks want more threads, the rounds of a mixture more registers.
    warps = 8 if blockwise else min(8 if mixed else 16, max(1, size // 128))
    drawn = 0 if teacher == patches - keep else teacher
    numbers = (patches, keep, int(scored), seed, stream, *terms, rows, columns, block_min, drawn)
    ways = (max(1, epochs - 1), *important, *hints)
    launch(ccmim_sample_partition_kernel, len(ids_B), *tensors, *numbers, *ways, **block, warps=warps)
    *indices, mask_BL, nan_B, ids_teacher_BT = out
    return *indices, mask_BL.view(torch.bool), nan_B.view(torch.bool), ids_teacher_BT
