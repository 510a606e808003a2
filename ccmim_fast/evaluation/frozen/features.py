"""A frozen encoder turns a whole data set into features: one vector an image."""

# B batch, H height, W width, C channels, T tokens (prefix tokens first), D width, N images, S of one rank's share

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from ccmim_fast.data.source import usable_count
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.errors import DataError, NumericsError
from ccmim_fast.evaluation.job import Images, Job
from ccmim_fast.models.precision import choose_precision
from ccmim_fast.ranks.session import gather_ranks

_BATCH = 256  # images encoded at once by a rank
_EXACT = nullcontext()  # in place of autocast: float32
_UNCHANGED = nn.Identity()


def pooled(tokens_BTD: Tensor, prefix: int, pool: Literal["avg", "cls"]) -> Tensor:
    """Return one vector an image [B, D]: the mean over the patches' tokens, or the first token."""
    return tokens_BTD[:, 0] if pool == "cls" else tokens_BTD[:, prefix:].mean(dim=1)


def extract(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    prefix: int = 1,
    pool: Literal["avg", "cls"] = "avg",
    autocast: AbstractContextManager = _EXACT,
    norm: Callable[[Tensor], Tensor] = _UNCHANGED,
) -> tuple[Tensor, Tensor | None]:
    """Encode every image and pool its tokens to one vector, see `pooled`.

    `encode` turns uint8 images [B, H, W, C] into the normalised final tokens [B, T, D] of any float dtype, first
    `prefix` tokens (CLS, registers). It is called under `inference_mode` and `autocast`, and is in evaluation mode.
    `norm` is of the pooled vector.

    Returns features [N, D] float32 and labels [N] int64, on the CPU and usable under autograd; None without labels.
    Raises ValueError: `pool` is neither name, or is `cls` with no prefix token; DataError: no batch at all;
    NumericsError: a feature that is not finite.
    """
    if pool not in ("avg", "cls") or (pool == "cls" and prefix < 1):
        raise ValueError(f"pool={pool!r} with prefix={prefix}: pool must be 'avg', or 'cls' with prefix >= 1")
    features, labels = [], []
    for batch in batches:
        with torch.inference_mode(), autocast:
            tokens_BTD = encode(batch.images_BHWC).float()
            features.append(norm(pooled(tokens_BTD, prefix, pool)).cpu())
        labels.append(batch.labels_B)
    if not features:
        raise DataError("no images to encode: the source gave no batch")
    # Concatenated outside inference_mode: an inference tensor could not be saved for a backward pass later.
    features_ND = torch.cat(features)
    if not features_ND.isfinite().all():
        bad = int((~features_ND.isfinite().all(dim=1)).sum())
        raise NumericsError(f"features of {bad} of {len(features_ND)} images are not finite")
    return features_ND, None if None in labels else torch.cat(labels).cpu()


def features(job: Job, images: Images) -> tuple[Tensor, Tensor]:
    """Return features [S, D] float32 and labels [S] of this rank's share, every `world_size`-th image, on the CPU."""
    pool, device = job.config.model.pool, job.here.device
    encoder, precision = job.frozen_encoder(pool), choose_precision(job.config.train.precision, device)
    return extract(encoder, job.batches(images, _BATCH), encoder.prefix, pool, precision.autocast(device), encoder.norm)


def features_of_all_ranks(job: Job, images: Images) -> tuple[Tensor, Tensor]:
    """Return features [N, D] and labels [N] of all images in their order, on the CPU of every rank."""
    count, joined = usable_count(images.source), []
    for share in features(job, images):
        # A rank may have one less than the first: a row that is cut off again at the end.
        padded = share.new_zeros(-(-count // job.here.world_size), *share.shape[1:])
        padded[: len(share)] = share
        joined.append(gather_ranks(padded).transpose(0, 1).flatten(0, 1)[:count])
    return joined[0], joined[1]
