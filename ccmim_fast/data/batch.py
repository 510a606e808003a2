"""What a loader yields."""

# N samples, B batch, H height, W width, C channels

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch of one rank, on the training device.

    Attributes:
        images_BHWC: uint8, crops of `data.image_size`.
        ids_B: int64 sample ids: the index of each image in its source, the key of its mask.
        epochs_B: int64, the epoch each image is shown in, which keys its mask too; nearly always one.
        labels_B: int64 class indices, or None where the source has none.
    """

    images_BHWC: Tensor
    ids_B: Tensor
    epochs_B: Tensor
    labels_B: Tensor | None = None


def make_batch(
    images_BHWC: Tensor, ids_B: np.ndarray, epochs_B: np.ndarray, labels_N: np.ndarray | None, device: torch.device
) -> Batch:
    """Put what belongs to the images on their device, without making the host wait for it."""
    of_images = [ids_B, epochs_B] if labels_N is None else [ids_B, epochs_B, labels_N[ids_B]]
    numbers = torch.from_numpy(np.stack(of_images).astype(np.int64))
    if device.type == "cuda":  # pinned memory alone is copied asynchronously
        numbers = numbers.pin_memory().to(device, non_blocking=True)
    return Batch(images_BHWC, *numbers.unbind())
