"""This kernel of `cls_row` computes the [CLS] row of an attention map, keys read once.

Instructions take 54 % of the time of the bytes on an H200 (benchmarks/results/2026-11-30-audit-after-tokens.md):
each value is converted and multiplied, and eight threads exchange sums for each logit. What is written and read again
are the logits, 3 % of the keys.
"""

# B batch, T tokens, P prefix tokens, L patches (T = P + L), N heads, H head dim

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.triton_impl.launch import MOST_REGISTERS, ROW_SIZES, fitting, launch, rows_contiguous

# Values of a head that a program holds at once: the smallest of these that suffices.
HEAD_SIZES = (64, 128, 1024)

# Registers of a thread, keys of 2 bytes: 32 warps are then resident on a multiprocessor. Without a limit ptxas takes 80
# to 90; with keys of 4 bytes, or the widest heads, 64 spill.
REGISTERS = 64


@triton.jit
def store_logits(
    q_ptr,
    k_ptr,
    logits_ptr,
    T,
    N,
    scale,
    H,
    q_stride_n,
    k_stride_t,
    k_stride_n,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Write q . k of one image, [N, T]: some heads at a time, which lie side by side, for all tokens."""
    column = tl.arange(0, BLOCK_H)[None, None, :]
    step = tl.arange(0, TOKENS)
    token = step[:, None, None]
    for first in range(0, N, HEADS):
        head = first + tl.arange(0, HEADS)
        # Where heads are the slowest dimension, their offset exceeds 32 bits.
        place = head.to(tl.int64)[None, :, None]
        used = (head < N)[None, :, None] & (column < H)
        q = tl.load(q_ptr + place * q_stride_n + column, mask=used, other=0.0).to(tl.float32) * scale
        source = k_ptr + token.to(tl.int64) * k_stride_t + place * k_stride_n + column
        k = tl.load(source, mask=used & (token < T), other=0.0)
        for start in range(0, T, TOKENS):
            # The next keys are on their way while threads wait for each other to store.
            source += TOKENS * tl.cast(k_stride_t, tl.int64)
            following = tl.load(source, mask=used & (token < T - TOKENS - start), other=0.0)
            logits = tl.sum(k.to(tl.float32) * q, 2)
            target = logits_ptr + (start + step)[:, None] + (head * T)[None, :]
            tl.store(target, logits, mask=(start + step < T)[:, None] & (head < N)[None, :])
            k = following


@triton.jit(do_not_specialize=["T", "N", "prefix", "has_total", "softmax"])
def ccmim_cls_row_kernel(
    q_ptr,  # [B, N, H] float, last dimension contiguous
    k_ptr,  # [B, T, N, H] float, last dimension contiguous
    total_ptr,  # [B, L] fp32; not read where has_total = 0
    logits_ptr,  # [B, N, T] fp32, out
    out_ptr,  # [B, L] fp32, out
    T,
    N,
    prefix,
    has_total,
    softmax,
    scale,
    H,
    q_stride_b,
    q_stride_n,
    k_stride_b,
    k_stride_t,
    k_stride_n,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute one image's row. Replaces: einsum, softmax, slice, mean, add.

    Reads B * T * N * H keys. The logits of all heads, 3 % of that, go through the L2 cache.
    """
    image = tl.program_id(0).to(tl.int64)
    q_ptr += image * q_stride_b
    k_ptr += image * k_stride_b
    logits_ptr += image * T * N
    store_logits(q_ptr, k_ptr, logits_ptr, T, N, scale, H, q_stride_n, k_stride_t, k_stride_n, TOKENS, HEADS, BLOCK_H)
    # What other threads of this program stored is read below.
    tl.debug_barrier()
    token = tl.arange(0, BLOCK_T)
    mean = tl.zeros([ROWS, BLOCK_T], tl.float32)
    for first in range(0, N, ROWS):
        head = (first + tl.arange(0, ROWS))[:, None]
        used = (head < N) & (token < T)[None, :]
        row = tl.load(logits_ptr + head * T + token[None, :], mask=used, other=0.0)
        if softmax != 0:
            row = tl.where((token < T)[None, :], row, float("-inf"))
            row = tl.exp(row - tl.max(row, 1)[:, None])
            row = row / tl.sum(row, 1)[:, None]
        mean += tl.where(used, row, 0.0)
    patch = token - prefix
    place = image * (T - prefix) + patch
    total = tl.load(total_ptr + place, mask=(patch >= 0) & (token < T * has_total), other=0.0)
    tl.store(out_ptr + place, total + tl.sum(mean, 0) / N, mask=(patch >= 0) & (token < T))


def cls_row(q_BNH: Tensor, k_BTNH: Tensor, total_BL: Tensor | None, prefix: int, kind: str, scale: float) -> Tensor:
    """Launch the kernel of `cls_row`."""
    B, T, N, H = k_BTNH.shape
    size, head = fitting(ROW_SIZES, T, "tokens"), fitting(HEAD_SIZES, H, "head_dim")
    q_BNH, k_BTNH = rows_contiguous(q_BNH), rows_contiguous(k_BTNH)
    logits_BNT = torch.empty(B, N, T, dtype=torch.float32, device=k_BTNH.device)
    out_BL = torch.empty(B, T - prefix, dtype=torch.float32, device=k_BTNH.device)
    tensors = (q_BNH, k_BTNH, out_BL if total_BL is None else total_BL.contiguous(), logits_BNT, out_BL)
    flags = (int(total_BL is not None), int(kind == "softmax"))
    strides = (*q_BNH.stride()[:2], *k_BTNH.stride()[:3])
    # 16 keys a thread, 4 of heads that are no multiple of 16 wide, see `tile_for`; then 8 logits a thread.
    heads, aligned = max(1, 256 // head), H % 16 == 0
    tokens = (4096 if aligned else 1024) // (heads * head)
    tile = {"TOKENS": tokens, "HEADS": heads, "BLOCK_H": head, "BLOCK_T": size, "ROWS": max(1, 2048 // size)}
    limited = aligned and head < HEAD_SIZES[-1] and k_BTNH.dtype.itemsize == 2
    registers = REGISTERS if limited else MOST_REGISTERS
    how = {"warps": 8, "fp_fusion": True, "registers": registers}
    launch(ccmim_cls_row_kernel, B, *tensors, T, N, prefix, *flags, float(scale), H, *strides, **tile, **how)
    return out_BL
