"""This benchmark times `divide_tokens` by given logits, both sets gathered."""

# B batch, L patches, K visible, T masked ones that the teacher sees, P prefix tokens, D width

import torch
from gather_tokens import gathered_bytes, scattered_bytes
from registry import DTYPES, FULL, HALF, ID, WIDTHS, Case, Passes, Size, empty, ids, made, separate
from sample_partition import partition_bytes, tensors_of

import ccmim_kernels
from ccmim_kernels.triton_impl import divide_tokens as launchers


def floor(s: Size) -> Passes:
    """The tokens of both sets are read once."""
    tokens, prefix = s.batch * (s.keep + s.teacher) * s.width * HALF, s.prefix * s.width * FULL
    sets = gathered_bytes(s, s.keep) + gathered_bytes(s, s.teacher)
    scores = s.batch * (s.patches * FULL + ID)
    return separate(tokens + prefix + scores + sets + partition_bytes(s), scattered_bytes(s))


def case(s: Size, device: torch.device) -> Case:
    def call(tokens_BLD, prefix_PD, ids_B, logits_BL, *, kernels):
        options = {"keep": s.keep, "teacher": s.teacher, "grid": s.grid, "seed": 0, "epoch": 0, "kernels": kernels}
        out = ccmim_kernels.divide_tokens(tokens_BLD, prefix_PD, ids_B, logits_BL=logits_BL, **options)
        return out.visible, out.masked, *tensors_of(out.partition)

    tokens_BLD = made(s.batch, s.patches, s.width, device=device, dtype=torch.bfloat16, grad=True)
    prefix_PD = made(s.prefix, s.width, device=device, grad=True)
    ids_B, logits_BL = torch.arange(s.batch, device=device), made(s.batch, s.patches, device=device)
    return Case(call, (tokens_BLD, prefix_PD, ids_B, logits_BL), (tokens_BLD, prefix_PD))


def launches() -> None:
    for dtype in DTYPES:
        for width in WIDTHS:
            tokens = empty(2, 196, width, dtype=dtype)
            for prefix in (empty(1, width), empty(1, width, dtype=dtype)):
                launchers.divide_tokens(tokens, prefix, ids(2, 49), ids(2, 147))
