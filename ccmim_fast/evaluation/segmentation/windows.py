"""Logits of a whole image from windows that overlap."""

# N windows, C channels, H height, W width, h w of a window, K classes

from collections.abc import Callable

import torch
from torch import Tensor


def slide(
    predict: Callable[[Tensor], Tensor], image_CHW: Tensor, window: tuple[int, int], stride: int, at_once: int
) -> Tensor:
    """The mean of all windows' logits at each pixel, [K, H, W], float32 at least.

    Windows are `stride` pixels apart; the last ones of rows and columns end with the image (mmsegmentation).

    Args:
        predict: [N, C, h, w] -> logits [N, K, h, w].
        image_CHW: as large as a window at least.
        window: h, w.
        stride: pixels, no more than a window's sides.
        at_once: windows that `predict` is given at most.
    """
    (h, w), (H, W) = window, image_CHW.shape[1:]
    places = [(y, x) for y in _starts(H, h, stride) for x in _starts(W, w, stride)]
    summed_KHW, counts_HW = 0, torch.zeros(H, W, device=image_CHW.device)
    for first in range(0, len(places), at_once):
        some = places[first : first + at_once]
        logits_NKhw = predict(torch.stack([image_CHW[:, y : y + h, x : x + w] for y, x in some]))
        if first == 0:
            dtype = torch.promote_types(logits_NKhw.dtype, torch.float32)
            summed_KHW = logits_NKhw.new_zeros((logits_NKhw.shape[1], H, W), dtype=dtype)
        for (y, x), logits_Khw in zip(some, logits_NKhw):
            summed_KHW[:, y : y + h, x : x + w] += logits_Khw
            counts_HW[y : y + h, x : x + w] += 1
    return summed_KHW / counts_HW


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover `length` pixels."""
    return [*range(0, length - window, stride), length - window]
