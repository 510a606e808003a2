"""This benchmark times `embed_tokens` with scores, of bfloat16 patches and float32 positions, as under autocast."""

# B batch, L patches, D width

import torch
from registry import DTYPES, FULL, HALF, Case, Passes, Size, empty, made, separate

import ccmim_kernels
from ccmim_kernels.triton_impl import embed_tokens as launchers

# The width is a constant of the kernel: those of ViT-S, B, L and H, and two that are no multiple of 16.
WIDTHS = (384, 768, 1024, 1280, 100, 3)


def floor(s: Size) -> Passes:
    """Patches are read, tokens written; the backward pass casts the gradient of the tokens to the patches' dtype."""
    projected, tokens = s.batch * s.patches * s.width * HALF, s.batch * s.patches * s.width * FULL
    parameters, scores = (s.patches + 1) * s.width * FULL, s.batch * s.patches * FULL
    return separate(projected + parameters + tokens + scores, tokens + projected)


def case(s: Size, device: torch.device) -> Case:
    def call(projected_BLD, positions_LD, direction_D, *, kernels):
        return tuple(ccmim_kernels.embed_tokens(projected_BLD, positions_LD, direction_D, kernels=kernels))

    projected_BLD = made(s.batch, s.patches, s.width, device=device, dtype=torch.bfloat16, grad=True)
    positions_LD, direction_D = made(s.patches, s.width, device=device), made(s.width, device=device) / s.width**0.5
    return Case(call, (projected_BLD, positions_LD, direction_D), (projected_BLD,))


def launches() -> None:
    for width in WIDTHS:
        for dtype in DTYPES:
            for positions in (empty(196, width), empty(196, width, dtype=dtype)):
                launchers.embed_tokens(empty(2, 196, width, dtype=dtype), positions, empty(width), 1e-6)
