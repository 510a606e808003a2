"""This kernel of `cls_row` computes the [CLS] row of an attention map, keys read once."""

# B batch, T tokens, P prefix tokens, L patches (T = P + L), N heads, H head dim

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccmim_kernels.triton_impl.launch import ROW_SIZES, fitting, launch, rows_contiguous


@triton.jit(do_not_specialize=["T", "N", "prefix", "has_total", "softmax"])
def ccmim_cls_row_kernel(
    q_ptr,  # [B, N, H] float, last dimension contiguous
    k_ptr,  # [B, T, N, H] float, last dimension contiguous
    total_ptr,  # [B, L] fp32; not read where has_total = 0
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
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Compute one image's row, heads in turn. Replaces: einsum, softmax, slice, mean, add. Reads B * T * N * H keys."""
    image = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK_T)
    valid = token < T
    keys = k_ptr + image * k_stride_b + (token.to(tl.int64) * k_stride_t)[:, None]
    mean = tl.zeros([BLOCK_T], tl.float32)
    for index in range(N):
        # Where heads are the slowest dimension, their offset exceeds 32 bits.
        head = tl.cast(index, tl.int64)
        row = tl.zeros([BLOCK_T], tl.float32)
        for start in range(0, H, BLOCK_H):
            column = start + tl.arange(0, BLOCK_H)
            q = tl.load(q_ptr + image * q_stride_b + head * q_stride_n + column, mask=column < H, other=0.0)
            inside = valid[:, None] & (column < H)[None, :]
            k = tl.load(keys + head * k_stride_n + column[None, :], mask=inside, other=0.0)
            row += tl.sum(k.to(tl.float32) * (q.to(tl.float32) * scale)[None, :], 1)
        if softmax != 0:
            row = tl.where(valid, row, float("-inf"))
            row = tl.exp(row - tl.max(row, 0))
            row = row / tl.sum(row, 0)
        mean += row
    patch = token - prefix
    kept = valid & (patch >= 0)
    place = image * (T - prefix) + patch
    total = tl.load(total_ptr + place, mask=(patch >= 0) & (token < T * has_total), other=0.0)
    tl.store(out_ptr + place, total + mean / N, mask=kept)


def cls_row(q_BNH: Tensor, k_BTNH: Tensor, total_BL: Tensor | None, prefix: int, kind: str, scale: float) -> Tensor:
    """Launch the kernel of `cls_row`."""
    B, T, N, H = k_BTNH.shape
    size = fitting(ROW_SIZES, T, "tokens")
    q_BNH, k_BTNH = rows_contiguous(q_BNH), rows_contiguous(k_BTNH)
    out_BL = torch.empty(B, T - prefix, dtype=torch.float32, device=k_BTNH.device)
    tensors = (q_BNH, k_BTNH, out_BL if total_BL is None else total_BL.contiguous(), out_BL)
    flags = (int(total_BL is not None), int(kind == "softmax"))
    strides = (*q_BNH.stride()[:2], *k_BTNH.stride()[:3])
    # 32 values a thread, 8 of heads that are no multiple of 16 wide (see `tile_for`); a head seldom exceeds 64.
    tile = {"BLOCK_T": size, "BLOCK_H": min(64, (8192 if H % 16 == 0 else 2048) // size), "warps": 8}
    launch(ccmim_cls_row_kernel, B, *tensors, T, N, prefix, *flags, float(scale), H, *strides, **tile)
    return out_BL
