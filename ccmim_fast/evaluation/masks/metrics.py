"""These figures say how scores and masks fall on objects whose place is known, and how far scores differ at all."""

# B images, H height, W width, L patches (row by row), P patch side

import math

import torch
from torch import Tensor


def object_patches(masks_BHW: Tensor, patch: int) -> Tensor:
    """Turn masks (bool, True on the object) into patch masks [B, L]: a patch is object where at least half of it is.

    Raises ValueError: `patch`, its side in pixels, does not divide both sides.
    """
    B, H, W = masks_BHW.shape
    if patch < 1 or H % patch or W % patch:
        raise ValueError(f"patch={patch} must divide the image's {H} x {W} pixels")
    blocks_BhPwP = masks_BHW.view(B, H // patch, patch, W // patch, patch)
    return (2 * blocks_BhPwP.sum(dim=(2, 4)) >= patch**2).flatten(1)


def score_auroc(scores_BL: Tensor, object_BL: Tensor) -> float:
    """Return the mean over images of the AUROC of patch scores, of any scale, against object patches (bool).

    Of one image it is the share of (object, background) pairs in which the object patch scores higher, a tie counting
    one half: 1 = every object patch above every other patch, 0.5 = no relation. It is computed from ranks
    (Mann-Whitney). Images with no object patch, or with nothing else, are left out. Raises ValueError: NaN in the
    scores, or no image with both kinds of patches.
    """
    if scores_BL.isnan().any():
        raise ValueError("scores hold NaN")
    objects_B, others_B = object_BL.sum(dim=1), (~object_BL).sum(dim=1)
    usable_B = (objects_B > 0) & (others_B > 0)
    if not usable_B.any():
        raise ValueError(f"none of {len(scores_BL)} images has both object and background patches")
    scores_BL = scores_BL.contiguous()
    sorted_BL = scores_BL.sort(dim=1).values
    below_BL, not_above_BL = (torch.searchsorted(sorted_BL, scores_BL, right=right) for right in (False, True))
    # The rank, from 1, of a tied group is the mean of its places.
    rank_sum_B = ((below_BL + not_above_BL + 1).double() / 2 * object_BL).sum(dim=1)
    auroc_B = (rank_sum_B - objects_B * (objects_B + 1) / 2) / (objects_B * others_B)
    return float(auroc_B[usable_B].mean())


def object_leakage(mask_BL: Tensor, object_BL: Tensor) -> float:
    """Return the share of all object patches that stay visible, relative to the share of all patches that do.

    1 = as many as random masking leaves, 0 = every object patch hidden, 1 / (1 - ratio) = every one visible. Masks are
    bool, True where masked. Raises ValueError: no patch is visible, or none shows an object.
    """
    if mask_BL.all() or not object_BL.any():
        which = "a visible patch" if mask_BL.all() else "an object patch"
        raise ValueError(f"none of {len(object_BL)} images has {which}")
    visible_BL = ~mask_BL
    return float(visible_BL[object_BL].double().mean() / visible_BL.double().mean())


def score_entropy(scores_BL: Tensor) -> float:
    """Return the mean entropy of scores that sum to 1, as a share of log L: 1 = all patches alike, 0 = all on one."""
    return float(torch.special.entr(scores_BL.double()).sum(1).mean()) / math.log(scores_BL.shape[1])


def top_share(scores_BL: Tensor, share: float = 0.25) -> float:
    """Return the mean sum of the scores of each image's highest patches; `share` itself where all are alike.

    Scores of an image sum to 1; the share of its patches is rounded down, but one at least.
    """
    count = max(1, int(scores_BL.shape[1] * share))
    return float(scores_BL.double().topk(count, dim=1).values.sum(1).mean())
