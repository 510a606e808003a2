"""This benchmark times `restore_tokens` at the decoder's width."""

# B batch, L patches, K visible, D width, T = 1 + K, S = 1 + L

import torch
from registry import DTYPES, FULL, HALF, ID, WIDTHS, Case, Passes, Size, empty, ids, made, made_partition, separate

import ccmim_kernels
from ccmim_kernels.triton_impl import restore_tokens as launchers


def floor(s: Size) -> Passes:
    D = s.decoder_width
    visible, grid = s.batch * (1 + s.keep) * D * HALF, s.batch * (1 + s.patches) * D * HALF
    index, mask_token, positions = s.batch * s.patches * ID, D * FULL, (1 + s.patches) * D * FULL
    return separate(visible + index + mask_token + positions + grid, grid + index + visible + mask_token)


def case(s: Size, device: torch.device) -> Case:
    def call(*inputs, kernels):
        return (ccmim_kernels.restore_tokens(*inputs, kernels=kernels),)

    D = s.decoder_width
    visible_BTD = made(s.batch, 1 + s.keep, D, device=device, dtype=torch.bfloat16, grad=True)
    mask_token_D = made(D, device=device, grad=True)
    ids_restore_BL, positions_SD = made_partition(s, device).ids_restore_BL, made(1 + s.patches, D, device=device)
    return Case(call, (visible_BTD, mask_token_D, ids_restore_BL, positions_SD), (visible_BTD, mask_token_D))


def launches() -> None:
    for dtype in DTYPES:
        for width in WIDTHS:
            launchers.restore_tokens(empty(2, 50, width, dtype=dtype), empty(width), ids(2, 196), empty(197, width))
            launchers.restore_tokens_gradients(empty(2, 197, width, dtype=dtype), ids(2, 196), 49)
