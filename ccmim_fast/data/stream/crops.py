"""The random crop and flip of an image depend on (seed, epoch, sample id) alone, not on the batch or the machine."""

# B batch, A attempts

from typing import Literal

import numpy as np
import torch

from ccmim_kernels.philox import STREAM_CROP, philox_4x32, stream_key, to_unit

_ATTEMPTS = 10  # torchvision's RandomResizedCrop


def crop_boxes(
    seed: int,
    epochs_B: np.ndarray | int,
    ids_B: np.ndarray,
    sizes_B2: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rule: Literal["torchvision", "mae"] = "torchvision",
) -> np.ndarray:
    """Draw boxes of a random resized crop, [B, 4] int64: y, x, height, width in pixels.

    The area is uniform in `scale` (share of the image), the aspect width / height log-uniform in `ratio`, the position
    uniform. A box that does not fit in the image is drawn again by torchvision's rule: the first of ten attempts that
    fits counts; if none fits, the box is central with the aspect clamped to `ratio`. By the rule of MAE's linear probe
    (BYOL's) there is one attempt, whose sides are cut to the image's: the crops are larger. Seed and epochs are
    0 .. 2**32 - 1; `sizes_B2` is the height and width of the images, >= 1.
    """
    attempts = range(_ATTEMPTS if rule == "torchvision" else 1)
    u_area, u_aspect, u_y, u_x = _uniforms(seed, epochs_B, ids_B, attempts)
    height_B1, width_B1 = sizes_B2.astype(np.float64)[:, :1], sizes_B2.astype(np.float64)[:, 1:]
    area_BA = height_B1 * width_B1 * (scale[0] + u_area * (scale[1] - scale[0]))
    log_low, log_high = np.log(ratio)
    aspect_BA = np.exp(log_low + u_aspect * (log_high - log_low))
    w_BA, h_BA = np.rint(np.sqrt(area_BA * aspect_BA)), np.rint(np.sqrt(area_BA / aspect_BA))
    if rule == "mae":
        w_BA, h_BA = np.clip(w_BA, 1, width_B1), np.clip(h_BA, 1, height_B1)
    fits_BA = (w_BA > 0) & (w_BA <= width_B1) & (h_BA > 0) & (h_BA <= height_B1)
    y_BA, x_BA = np.floor(u_y * (height_B1 - h_BA + 1)), np.floor(u_x * (width_B1 - w_BA + 1))
    drawn_BA4 = np.stack([y_BA, x_BA, h_BA, w_BA], axis=-1)
    drawn_B4 = drawn_BA4[np.arange(len(ids_B)), fits_BA.argmax(axis=1)]
    w_B1 = np.minimum(width_B1, np.maximum(1, np.rint(height_B1 * ratio[1])))
    h_B1 = np.minimum(height_B1, np.maximum(1, np.rint(width_B1 / ratio[0])))
    central_B4 = np.concatenate([(height_B1 - h_B1) // 2, (width_B1 - w_B1) // 2, h_B1, w_B1], axis=1)
    return np.where(fits_BA.any(axis=1)[:, None], drawn_B4, central_B4).astype(np.int64)


def flips(seed: int, epochs_B: np.ndarray | int, ids_B: np.ndarray) -> np.ndarray:
    """Draw which images are mirrored left to right, [B] bool, p = 0.5; a function of (seed, epoch, sample id)."""
    # The counter after the crop's attempts: the same key, but no random number in common.
    u_B1, *_ = _uniforms(seed, epochs_B, ids_B, range(_ATTEMPTS, _ATTEMPTS + 1))
    return u_B1[:, 0] < 0.5


def _uniforms(seed: int, epochs_B: np.ndarray | int, ids_B: np.ndarray, attempts: range) -> list[np.ndarray]:
    """Draw four independent uniforms [B, A] float64 in (0, 1) per sample and attempt."""
    epochs_B = np.broadcast_to(epochs_B, ids_B.shape)
    ids_B1, epochs_B1 = (torch.from_numpy(x_B.astype(np.int64))[:, None] for x_B in (ids_B, epochs_B))
    attempt_1A = torch.arange(attempts.start, attempts.stop)[None]
    key = stream_key(seed, STREAM_CROP)
    words = philox_4x32(key, attempt_1A, ids_B1 & 0xFFFFFFFF, ids_B1 >> 32, epochs_B1)
    return [to_unit(word_BA).numpy() for word_BA in words]
