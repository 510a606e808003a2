"""This benchmark times `gather_tokens` for both sets, as the model gathers them: the masked one without gradient."""

# B batch, L patches, K visible, M masked, P prefix tokens, D width

import torch
from registry import DTYPES, FULL, HALF, ID, WIDTHS, Case, Passes, Size, empty, ids, made, made_partition, separate

import ccmim_kernels
from ccmim_kernels.triton_impl import gather_tokens as launchers


def gathered_bytes(s: Size, rows: int) -> int:
    """Count `rows` gathered tokens an image with the prefix tokens in front."""
    return s.batch * (s.prefix + rows) * s.width * HALF


def scattered_bytes(s: Size) -> int:
    """Count the backward pass of a gather of the visible set: its gradient and ids to dense and prefix gradients."""
    dense = s.batch * s.patches * s.width * HALF
    return gathered_bytes(s, s.keep) + s.batch * s.keep * ID + dense + s.prefix * s.width * FULL


def floor(s: Size) -> Passes:
    tokens, index = s.batch * s.patches * s.width * HALF, s.batch * s.patches * ID
    sets = gathered_bytes(s, s.keep) + gathered_bytes(s, s.masked)
    return separate(tokens + index + s.prefix * s.width * FULL + sets, scattered_bytes(s))


def case(s: Size, device: torch.device) -> Case:
    def call(tokens_BLD, visible_BK, masked_BM, prefix_PD, *, kernels):
        visible = ccmim_kernels.gather_tokens(tokens_BLD, visible_BK, prefix_PD, kernels=kernels)
        masked = ccmim_kernels.gather_tokens(tokens_BLD.detach(), masked_BM, prefix_PD.detach(), kernels=kernels)
        return visible, masked

    tokens_BLD = made(s.batch, s.patches, s.width, device=device, dtype=torch.bfloat16, grad=True)
    prefix_PD = made(s.prefix, s.width, device=device, grad=True)
    visible_BK, masked_BM, *_ = made_partition(s, device)
    return Case(call, (tokens_BLD, visible_BK, masked_BM, prefix_PD), (tokens_BLD, prefix_PD))


def launches() -> None:
    for dtype in DTYPES:
        for width in WIDTHS:
            tokens = empty(2, 196, width, dtype=dtype)
            for prefix in (empty(1, width), empty(1, width, dtype=dtype)):
                launchers.gather_tokens(tokens, ids(2, 49), prefix)
            launchers.scatter_tokens(empty(2, 50, width, dtype=dtype), ids(2, 49), 196)
