"""These kernels of `info_nce` need no B x N logits in memory: one for the log-sum-exp, one for both gradients.

Both losses are R query rows against N keys. Row r belongs to image i = r or r - B, whose own key is offset + i. Rows
below `excluded` leave their own key out (the students of Eq. 7); for those from there on it is the positive. `info_nce`
has R = 2 B (students, then teachers) and excluded = B, `moco_nce` has R = B and excluded = 0.

Logits are relative to the image's positive, which is thus 0 exactly: the log-sum-exp is the loss itself, and where
training has made it small its rounding errors are small too, in backward also, where the products are made again.
"""

# R query rows, B local batch, N global batch, E embedding dim, S parts of a sum

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.triton_impl.launch import launch

# Programs to aim at: where there are fewer tiles, a sum is split into parts, which PyTorch adds up. A constant, so that
# the result is the same on every GPU; two for each of an H100's 132 multiprocessors, not measured.
_PROGRAMS = 256
_INTEGERS = ["R", "B", "N", "offset", "excluded", "parts", "length"]
_GRADIENT_INTEGERS = ["A", "C", "B", "offset", "excluded", "parts", "length"]


@triton.jit
def similarities(a_ptr, a_row, a_valid, c_ptr, c_row, c_valid, E, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply rows of `a` with rows of `c`: fp32 [len(a_row), len(c_row)]; rows not valid count as zero."""
    total = tl.zeros((a_row.shape[0], c_row.shape[0]), dtype=tl.float32)
    a_ptr += a_row.to(tl.int64)[:, None] * E
    c_ptr += c_row.to(tl.int64)[None, :] * E
    for start in range(0, E, BLOCK_E):
        lane = start + tl.arange(0, BLOCK_E)
        a = tl.load(a_ptr + lane[None, :], mask=a_valid[:, None] & (lane < E)[None, :], other=0.0)
        c = tl.load(c_ptr + lane[:, None], mask=c_valid[None, :] & (lane < E)[:, None], other=0.0)
        total = tl.dot(a, c, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=_INTEGERS)
def ccmim_logsumexp_kernel(
    queries_ptr,  # [R, E] fp32, rows of norm 1 or 0
    keys_ptr,  # [N, E] fp32, rows of norm 1 or 0
    positive_ptr,  # [B] fp32: similarity of each image's positive
    out_ptr,  # [S, R] fp32, out: log of the sum over a part's keys
    R,
    B,
    N,
    E,
    offset,
    excluded,
    scale,
    parts,
    length,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute log sum_j exp((q_r . k_j - positive) * scale) of one tile of queries over a part of the keys, online.

    Replaces: matmul, scale, scatter, cat and logsumexp over R x N logits (8 R N bytes and more, kept for backward).
    Moves: queries and keys, each from L2 once per tile of the other; writes 4 R S bytes. 2 R N E FLOPs.
    """
    part = tl.program_id(0) % parts
    row = (tl.program_id(0) // parts) * BLOCK_A + tl.arange(0, BLOCK_A)
    image = tl.where(row < B, row, row - B)
    positive = tl.load(positive_ptr + image, mask=row < R, other=0.0)
    largest = tl.full((BLOCK_A,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_A,), dtype=tl.float32)
    last = tl.minimum((part + 1) * length, N)
    for start in range(part * length, last, BLOCK_C):
        key = start + tl.arange(0, BLOCK_C)
        products = similarities(queries_ptr, row, row < R, keys_ptr, key, key < last, E, BLOCK_E, PRECISION)
        own = key[None, :] == (offset + image)[:, None]
        left_out = (key >= last)[None, :] | (own & (row < excluded)[:, None])
        logits = tl.where(own, 0.0, scale * (products - positive[:, None]))
        logits = tl.where(left_out, float("-inf"), logits)
        new = tl.maximum(largest, tl.max(logits, 1))
        # -inf - -inf is NaN: a row whose only key so far is left out.
        finite = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - finite) + tl.sum(tl.exp(logits - finite[:, None]), 1)
        largest = new
    tl.store(out_ptr + part.to(tl.int64) * R + row, largest + tl.log(total), mask=row < R)


@triton.jit(do_not_specialize=_GRADIENT_INTEGERS)
def ccmim_gradient_kernel(
    a_ptr,  # [A, E] fp32: the queries, or (OF_KEYS) the keys
    c_ptr,  # [C, E] fp32: the other ones
    positive_ptr,  # [B] fp32: similarity of each image's positive
    loss_ptr,  # [B] fp32: each image's loss
    weight_ptr,  # [B] fp32: gradient of image i's loss, times `scale`
    out_ptr,  # [S, A, E] fp32, out: gradient of `a`
    A,
    C,
    B,
    E,
    offset,
    excluded,
    scale,
    parts,
    length,
    OF_KEYS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum weight * (p - positive) * c for one tile of `a` and BLOCK_OUT columns, over a part of `c`.

    p = exp(logit - loss) is computed again, in every chunk. Replaces: softmax and scatter over the saved A x C logits,
    and the matmul. Moves: `a` and `c` from L2 once per tile of the other and chunk; writes 4 A E S bytes.
    2 A C E (E / BLOCK_OUT + 1) FLOPs.
    """
    part = tl.program_id(0) % parts
    chunks = (E + BLOCK_OUT - 1) // BLOCK_OUT
    tile = tl.program_id(0) // parts
    column = (tile % chunks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    a_row = (tile // chunks) * BLOCK_A + tl.arange(0, BLOCK_A)
    total = tl.zeros((BLOCK_A, BLOCK_OUT), dtype=tl.float32)
    last = tl.minimum((part + 1) * length, C)
    for start in range(part * length, last, BLOCK_C):
        c_row = start + tl.arange(0, BLOCK_C)
        products = similarities(a_ptr, a_row, a_row < A, c_ptr, c_row, c_row < last, E, BLOCK_E, PRECISION)
        query, key, query_valid = a_row[:, None], c_row[None, :], (a_row < A)[:, None]
        if OF_KEYS:
            query, key, query_valid = c_row[None, :], a_row[:, None], (c_row < last)[None, :]
        image = tl.where(query < B, query, query - B)
        positive = tl.load(positive_ptr + image, mask=query_valid, other=0.0)
        loss = tl.load(loss_ptr + image, mask=query_valid, other=0.0)
        weight = tl.load(weight_ptr + image, mask=query_valid, other=0.0)
        p = tl.exp(scale * (products - positive) - loss)
        p = tl.where(key == offset + image, tl.where(query < excluded, 0.0, tl.exp(-loss) - 1.0), p)
        # By where, not by the zeros loaded for `c`: exp may be infinite where no row is.
        p = tl.where((c_row < last)[None, :], weight * p, 0.0)
        c = tl.load(
            c_ptr + c_row.to(tl.int64)[:, None] * E + column[None, :],
            mask=(c_row < last)[:, None] & (column < E)[None, :],
            other=0.0,
        )
        total = tl.dot(p, c, total, input_precision=PRECISION)
    place = (part.to(tl.int64) * A + a_row[:, None]) * E + column[None, :]
    tl.store(out_ptr + place, total, mask=(a_row < A)[:, None] & (column < E)[None, :])


# Every BLOCK_E divides it; rows padded to it need no mask of columns in the innermost loop, and no unaligned variants.
_WIDTH = 32
# By precision: BLOCK_A, BLOCK_C, BLOCK_E, warps. Without spills on all architectures and on Triton 3.3.1, 3.6 and 3.8
# (benchmarks/ops/ahead_of_time.py); their speed was not measured.
_LOGSUMEXP_TILES = {"tf32x3": (64, 64, 16, 8), "ieee": (64, 64, 16, 8)}
# The same, with BLOCK_OUT before the warps.
_GRADIENT_TILES = {"tf32x3": (64, 32, 16, 128, 8), "ieee": (32, 32, 16, 128, 8)}


def dot_precision(device: torch.device) -> str:
    """Say how `tl.dot` multiplies float32: three TF32 products where tensor cores have TF32, else as it is."""
    return "tf32x3" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "ieee"


def padded(rows: Tensor) -> Tensor:
    """Pad the rows with zeros to a multiple of `_WIDTH` columns, contiguous; of an embedding of 256 no copy is made."""
    missing = -rows.shape[1] % _WIDTH
    return F.pad(rows, (0, missing)) if missing else rows.contiguous()


def queries(student_BE: Tensor, teacher_BE: Tensor | None) -> Tensor:
    """Return the query rows [R, E]."""
    return student_BE if teacher_BE is None else torch.cat([student_BE, teacher_BE])


def split(tiles: int, rows: int, block: int) -> tuple[int, int]:
    """Return (parts, length): `tiles` programs sum over `rows` in parts of `length` rows, a multiple of `block`."""
    blocks = triton.cdiv(rows, block)
    length = triton.cdiv(blocks, max(1, min(blocks, _PROGRAMS // tiles))) * block
    return triton.cdiv(rows, length), length


def info_nce(student_BE, teacher_BE, keys_NE, offset, tau, precision: str | None = None) -> tuple[Tensor, Tensor]:
    """Launch the kernel of the loss for the operator's arguments; `precision` of the products: `dot_precision`'s."""
    precision = precision or dot_precision(keys_NE.device)
    block_a, block_c, block_e, warps = _LOGSUMEXP_TILES[precision]
    queries_RE, keys_NE = padded(queries(student_BE, teacher_BE)), padded(keys_NE)
    (rows, width), keys, batch = queries_RE.shape, len(keys_NE), len(student_BE)
    excluded = rows - batch
    tiles = triton.cdiv(rows, block_a)
    parts, length = split(tiles, keys, block_c)
    positive_B = (queries_RE[excluded:] * keys_NE[offset : offset + batch]).sum(1)
    lse_SR = queries_RE.new_empty((parts, rows))
    numbers = (rows, batch, keys, width, offset, excluded, 1.0 / tau, parts, length)
    tile = {"BLOCK_A": block_a, "BLOCK_C": block_c, "BLOCK_E": block_e, "PRECISION": precision, "warps": warps}
    tensors = (queries_RE, keys_NE, positive_B, lse_SR)
    launch(ccmim_logsumexp_kernel, tiles * parts, *tensors, *numbers, fp_fusion=True, **tile)
    return lse_SR.view(-1, batch).logsumexp(0), positive_B


def info_nce_gradient(
    student_BE, teacher_BE, keys_NE, loss_B, positive_B, grad_B, offset, tau, of_keys, precision: str | None = None
) -> Tensor:
    """Launch the kernel of the gradient of sum_i grad_i loss_i; teachers have none, but count in that of the keys."""
    precision = precision or dot_precision(keys_NE.device)
    block_a, block_c, block_e, block_out, warps = _GRADIENT_TILES[precision]
    excluded = 0 if teacher_BE is None else len(student_BE)
    a_AE, c_CE = (keys_NE, queries(student_BE, teacher_BE)) if of_keys else (student_BE, keys_NE)
    embedding = a_AE.shape[1]
    a_AE, c_CE = padded(a_AE), padded(c_CE)
    (rows, width), others = a_AE.shape, len(c_CE)
    tiles = triton.cdiv(rows, block_a) * triton.cdiv(width, block_out)
    parts, length = split(tiles, others, block_c)
    out_SAE = a_AE.new_empty((parts, rows, width))
    tensors = (a_AE, c_CE, positive_B, loss_B, (grad_B / tau).contiguous(), out_SAE)
    numbers = (rows, others, len(loss_B), width, offset, excluded, 1.0 / tau, parts, length)
    tile = {"BLOCK_A": block_a, "BLOCK_C": block_c, "BLOCK_E": block_e, "BLOCK_OUT": block_out, "warps": warps}
    options = {"OF_KEYS": of_keys, "PRECISION": precision, "fp_fusion": True}
    launch(ccmim_gradient_kernel, tiles * parts, *tensors, *numbers, **tile, **options)
    out_AE = out_SAE[0] if parts == 1 else out_SAE.sum(0)
    return out_AE[:, :embedding].contiguous()
