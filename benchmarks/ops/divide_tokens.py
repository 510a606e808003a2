"""This benchmark times `divide_tokens` scored by a direction, both sets gathered."""

# B batch, L patches, P prefix tokens, D width

import torch
from gather_tokens import gathered_bytes, scattered_bytes
from registry import DTYPES, FULL, HALF, ID, WIDTHS, Case, Passes, Size, empty, ids, made, separate
from sample_partition import partition_bytes

import ccmim_kernels
from ccmim_kernels.triton_impl import divide_tokens as launchers
from ccmim_kernels.triton_impl.launch import ROW_SIZES


def floor(s: Size) -> Passes:
    """The tokens are read once for both sets."""
    tokens, parameters = s.batch * s.patches * s.width * HALF, (s.prefix + 1) * s.width * FULL
    sets = gathered_bytes(s, s.keep) + gathered_bytes(s, s.masked)
    scores = s.batch * (ID + s.patches * FULL)
    return separate(tokens + parameters + scores + sets + partition_bytes(s), scattered_bytes(s))


def case(s: Size, device: torch.device) -> Case:
    def call(tokens_BLD, prefix_PD, ids_B, direction_D, *, kernels):
        options = {"keep": s.keep, "grid": s.grid, "seed": 0, "epoch": 0, "kernels": kernels}
        out = ccmim_kernels.divide_tokens(tokens_BLD, prefix_PD, ids_B, direction_D=direction_D, **options)
        return out.visible, out.masked, *out.partition, out.logits

    tokens_BLD = made(s.batch, s.patches, s.width, device=device, dtype=torch.bfloat16, grad=True)
    prefix_PD = made(s.prefix, s.width, device=device, grad=True)
    ids_B = torch.arange(s.batch, device=device)
    direction_D = made(s.width, device=device) / s.width**0.5
    return Case(call, (tokens_BLD, prefix_PD, ids_B, direction_D), (tokens_BLD, prefix_PD))


def launches() -> None:
    for size in ROW_SIZES:
        for dtype in DTYPES:
            for width in WIDTHS:
                tokens, prefix = empty(2, size, width, dtype=dtype), empty(1, width)
                for logits, direction in ((empty(2, size), None), (None, empty(width))):
                    scores = (logits, direction, 1e-6)
                    sampling = (size // 4, 0, ids(2), "importance_sampling", "gumbel", 1.0)
                    launchers.divide_tokens(tokens, prefix, ids(2), *scores, True, *sampling)
