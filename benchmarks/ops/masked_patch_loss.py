"""This benchmark times `masked_patch_loss` with normalised patches."""

# B batch, M masked, P values of a patch, C channels

import itertools

import torch
from registry import (
    BYTE,
    DTYPES,
    FULL,
    HALF,
    ID,
    Case,
    Passes,
    Size,
    Work,
    empty,
    ids,
    made,
    made_images,
    made_partition,
)

import ccmim_kernels
from ccmim_kernels.triton_impl import masked_patch_loss as launchers

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as in MAE


def floor(s: Size) -> Passes:
    """Backward reads a residual and writes the gradient; one pass over prediction and pixels could do both."""
    prediction, pixels = s.batch * s.masked * s.pixels * HALF, s.batch * s.masked * s.pixels * BYTE
    forward = prediction + pixels + s.batch * s.masked * ID + 2 * s.channels * FULL + FULL
    backward = FULL + 2 * prediction
    return {"forward": Work(forward), "backward": Work(backward), "both": Work(forward + prediction)}


def case(s: Size, device: torch.device) -> Case:
    def call(pred_BMP, images_BHWC, ids_BM, mean_C, std_C, *, kernels, **options):
        options = {"patch": s.patch, "mean_C": mean_C, "std_C": std_C, "kernels": kernels, **options}
        return (ccmim_kernels.masked_patch_loss(pred_BMP, images_BHWC, ids_BM, **options),)

    pred_BMP = made(s.batch, s.masked, s.pixels, device=device, dtype=torch.bfloat16, grad=True)
    mean_C, std_C = (torch.tensor(values, device=device) for values in (MEAN, STD))
    inputs = (pred_BMP, made_images(s, device), made_partition(s, device).ids_masked_BM, mean_C, std_C)
    return Case(call, inputs, (pred_BMP,), variants=({"norm_pix": False},))


def launches() -> None:
    # Rows of 48 bytes, of 42 (not a multiple of 16), of a single one, and a patch of four warps.
    for dtype in DTYPES:
        for patch, C in ((16, 3), (14, 3), (1, 1), (32, 3)):
            pred = empty(2, 3, patch**2 * C, dtype=dtype)
            for pixels, norm_pix in itertools.product((torch.uint8, torch.float32), (True, False)):
                images = empty(2, 2 * patch, 2 * patch, C, dtype=pixels)
                launchers.masked_patch_loss(pred, images, ids(2, 3), patch, empty(C), empty(C), norm_pix)
