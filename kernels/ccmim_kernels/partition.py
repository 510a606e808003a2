"""The split of an image's patches into a visible and a masked set."""

# B batch, L patches, K visible patches, M masked patches (K + M = L)

from typing import NamedTuple

import torch
from torch import Tensor


class Partition(NamedTuple):
    """One split per image, both sets in patch order.

    Attributes:
        ids_visible_BK, ids_masked_BM: int64 patch indices, ascending.
        ids_restore_BL: int64; row of patch i in the concatenation of both sets.
        mask_BL: bool, True where masked.
        nan_B: bool, True where a score of the image was NaN: NaN then counted as the largest score.
    """

    ids_visible_BK: Tensor
    ids_masked_BM: Tensor
    ids_restore_BL: Tensor
    mask_BL: Tensor
    nan_B: Tensor


def partition_from_mask(mask_BL: Tensor, keep: int) -> Partition:
    """The partition of a mask (bool, True = masked) in which each row leaves exactly `keep` patches visible."""
    shuffle_BL = mask_BL.to(torch.uint8).argsort(dim=1, stable=True)
    nan_B = torch.zeros(len(mask_BL), dtype=torch.bool, device=mask_BL.device)
    return Partition(shuffle_BL[:, :keep], shuffle_BL[:, keep:], shuffle_BL.argsort(dim=1), mask_BL, nan_B)
