"""This benchmark times `info_nce` on one rank, N = B, in float32 as the projector's BatchNorm gives it."""

# B batch, N all ranks' rows, E embedding dim

import torch
from registry import FULL, Case, Passes, Size, Work, empty, made

import ccmim_kernels
from ccmim_kernels.triton_impl import info_nce as launchers

TAU = 0.2  # the presets' temperature


def floor(s: Size) -> Passes:
    """Students and teachers meet N keys: two products forward; backward three, for students and for keys.

    A kernel that keeps no logits makes the two again in backward, seven in all: it can reach 5 / 7 of this floor.
    """
    N = s.keys or s.batch
    rows = 2 * s.batch if s.batch == N else 2 * s.batch + N
    gradients = s.batch if s.batch == N else s.batch + N
    read, written = rows * s.embedding * FULL, gradients * s.embedding * FULL
    product = 2 * s.batch * N * s.embedding
    return {
        "forward": Work(read + FULL, 2 * product),
        "backward": Work(FULL + read + written, 3 * product),
        "both": Work(read + FULL + written, 5 * product),
    }


def case(s: Size, device: torch.device) -> Case:
    def call(masked_BE, visible_BE, *, kernels):
        return (ccmim_kernels.info_nce(masked_BE, visible_BE, tau=TAU, kernels=kernels),)

    masked_BE = made(s.batch, s.embedding, device=device)
    visible_BE = made(s.batch, s.embedding, device=device, grad=True)
    return Case(call, (masked_BE, visible_BE), (visible_BE,))


def launches() -> None:
    h_BE, rows_B = empty(4, 256), empty(4)
    for precision in ("tf32x3", "ieee"):
        options = {"offset": 0, "tau": TAU, "precision": precision}
        launchers.info_nce(h_BE, h_BE, h_BE, **options)
        for of_keys in (False, True):
            launchers.info_nce_gradient(h_BE, None, h_BE, rows_B, rows_B, rows_B, of_keys=of_keys, **options)
