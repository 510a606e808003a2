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
        labels_B: int64 class indices, or None where the source has none.
    """

    images_BHWC: Tensor
    ids_B: Tensor
    labels_B: Tensor | None


def make_batch(images_BHWC: Tensor, ids_B: np.ndarray, labels_N: np.ndarray | None, device: torch.device) -> Batch:
    """Put a micro-batch on the device, without making the host wait for it."""
    labels_B = None if labels_N is None else to_device(torch.from_numpy(labels_N[ids_B]), device)
    return Batch(to_device(images_BHWC, device), to_device(torch.from_numpy(ids_B.copy()), device), labels_B)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; from the CPU to a GPU by way of pinned memory, which alone is copied asynchronously."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
