"""This benchmark times `cls_row` of one block with a softmax; the op has no gradient."""

# B batch, N heads, H head dim

import torch
from registry import DTYPES, FULL, HALF, Case, Passes, Size, Work, empty, made

import ccmim_kernels
from ccmim_kernels.triton_impl import cls_row as launchers
from ccmim_kernels.triton_impl.launch import ROW_SIZES

HEADS = (64, 80, 768, 25, 100, 300)  # widths of heads: multiples of 16 for each of the kernel's tiles, and others


def floor(s: Size) -> Passes:
    """The keys are read once."""
    queries, keys = s.batch * s.width * HALF, s.batch * (s.prefix + s.patches) * s.width * HALF
    return {"forward": Work(queries + keys + s.batch * s.patches * FULL)}


def case(s: Size, device: torch.device) -> Case:
    if s.width % s.head_dim:
        raise ValueError(f"width={s.width} must be a multiple of {s.head_dim}")

    def call(q_BNH, k_BTNH, *, kernels):
        options = {"prefix": s.prefix, "kind": "softmax", "scale": s.head_dim**-0.5, "kernels": kernels}
        return (ccmim_kernels.cls_row(q_BNH, k_BTNH, **options),)

    heads = s.width // s.head_dim
    q_BNH = made(s.batch, heads, s.head_dim, device=device, dtype=torch.bfloat16)
    k_BTNH = made(s.batch, s.prefix + s.patches, heads, s.head_dim, device=device, dtype=torch.bfloat16)
    return Case(call, (q_BNH, k_BTNH))


def launches() -> None:
    for size in ROW_SIZES:
        for dtype in DTYPES:
            for width in HEADS:
                for kind in ("logits", "softmax"):
                    q, k = empty(2, 3, width, dtype=dtype), empty(2, size, 3, width, dtype=dtype)
                    launchers.cls_row(q, k, None, 1, kind, 0.125)
