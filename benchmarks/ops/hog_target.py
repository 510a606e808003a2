"""This benchmark times `hog_target`; the op has no gradient."""

# B batch, M masked

import torch
from registry import BYTE, DTYPES, FULL, ID, Case, Passes, Size, Work, empty, ids, made_images, made_partition

import ccmim_kernels
from ccmim_kernels.triton_impl import hog_target as launchers


def floor(s: Size) -> Passes:
    """Whole images are read: a masked patch needs its neighbours' borders too."""
    images = s.batch * s.patches * s.pixels * BYTE
    features = (s.patch // s.cell) ** 2 * s.channels * s.bins
    return {"forward": Work(images + s.batch * s.masked * (ID + features * FULL))}


def case(s: Size, device: torch.device) -> Case:
    def call(images_BHWC, ids_BM, *, kernels):
        options = {"patch": s.patch, "bins": s.bins, "cell": s.cell, "kernels": kernels}
        return (ccmim_kernels.hog_target(images_BHWC, ids_BM, **options),)

    return Case(call, (made_images(s, device), made_partition(s, device).ids_masked_BM))


def launches() -> None:
    # MaskFeat's cells in each dtype, large cells and many bins, and cells whose rows are no whole words.
    maskfeat = (16, 8, 9, 3)
    others = ((32, 32, 18, 3), (7, 7, 9, 1))
    for dtype, (patch, cell, bins, C) in (*((dtype, maskfeat) for dtype in DTYPES), *((DTYPES[0], x) for x in others)):
        launchers.hog_target(empty(2, patch, patch, C, dtype=torch.uint8), ids(2, 1), patch, bins, cell, dtype)
