"""What a loader yields."""

# B batch, H height, W width, C channels

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch of one rank, on the training device.

    Attributes:
        images_BHWC: uint8, crops of `data.image_size`.
        ids_B: int64 sample ids: the index of each image in its source, the key of its mask.
        labels_B: int64 class indices, or None where the source has none.
    """

    images_BHWC: Tensor
    ids_B: Tensor
    labels_B: Tensor | None
