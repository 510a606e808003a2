"""Frozen features of a whole data set: one vector an image."""

# B batch, H height, W width, C channels, T tokens (prefix tokens first), D width, N images

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.errors import DataError, NumericsError


def extract(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    prefix: int = 1,
    pool: Literal["avg", "cls"] = "avg",
) -> tuple[Tensor, Tensor | None]:
    """Encode every image and pool its tokens to one vector.

    Args:
        encode: uint8 images [B, H, W, C] -> the normalised final tokens [B, T, D] of any float dtype, prefix tokens
            (CLS, registers) first. It is called under `inference_mode`; evaluation mode and precision are its caller's.
        prefix: number of prefix tokens.
        pool: `avg` is the mean over the patch tokens (the paper's evaluation), `cls` the first token.

    Returns:
        features [N, D] float32 and labels [N] int64, both on the CPU and usable under autograd; labels are None where
        the batches carry none.

    Raises:
        ValueError: `pool` is neither name, or is `cls` with no prefix token.
        DataError: no batch at all.
        NumericsError: a feature that is not finite.
    """
    if pool not in ("avg", "cls") or (pool == "cls" and prefix < 1):
        raise ValueError(f"pool={pool!r} with prefix={prefix}: pool must be 'avg', or 'cls' with prefix >= 1")
    features, labels = [], []
    for batch in batches:
        with torch.inference_mode():
            tokens_BTD = encode(batch.images_BHWC).float()
            pooled_BD = tokens_BTD[:, 0] if pool == "cls" else tokens_BTD[:, prefix:].mean(dim=1)
        features.append(pooled_BD.cpu())
        labels.append(batch.labels_B)
    if not features:
        raise DataError("no images to encode: the source gave no batch")
    # Concatenated outside inference_mode: an inference tensor could not be saved for a backward pass later.
    features_ND = torch.cat(features)
    if not features_ND.isfinite().all():
        bad = int((~features_ND.isfinite().all(dim=1)).sum())
        raise NumericsError(f"features of {bad} of {len(features_ND)} images are not finite")
    return features_ND, None if None in labels else torch.cat(labels).cpu()
