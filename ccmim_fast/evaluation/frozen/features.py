"""A frozen encoder turns a whole data set into features: one vector an image."""

# B batch, H height, W width, C channels, T tokens (prefix tokens first), D width, N images, S of one rank's share

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccmim_fast.data.source import usable_count
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.errors import DataError, NumericsError
from ccmim_fast.evaluation.encoders import Encoder
from ccmim_fast.evaluation.images import Images
from ccmim_fast.evaluation.job import Job
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


class Features(NamedTuple):
    """This tuple holds features and labels of images in ascending order of their ids, on the CPU."""

    features_SD: Tensor  # float32
    labels_S: Tensor  # int64
    ids_S: Tensor  # int64


def features(job: Job, encoder: Encoder, images: Images) -> Features:
    """Return those of this rank's share, every `world_size`-th image; images that fail are left out."""
    pool, device, ids = job.config.model.pool, job.here.device, []

    def noted(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            ids.append(torch.from_numpy(batch.host_ids_B))
            yield batch

    batches, precision = noted(job.batches(images, _BATCH)), choose_precision(job.config.train.precision, device)
    first = next(batches, None)
    if first is None:  # fewer images than ranks, or none that can be read
        none = torch.zeros(0, dtype=torch.int64)
        return Features(torch.zeros(0, encoder.width), none, none)
    found = extract(encoder, chain([first], batches), encoder.prefix, pool, precision.autocast(device), encoder.norm)
    return Features(*found, torch.cat(ids))


def features_of_all_ranks(job: Job, encoder: Encoder, images: Images) -> Features:
    """Return those of all images, on every rank. Raises DataError: none of them can be read."""
    own = features(job, encoder, images)
    most = int(gather_ranks(torch.tensor([len(own.ids_S)])).max())
    if not most:
        raise DataError(f"none of the {usable_count(images.source)} images of {images.data.root!r} can be read")
    # A rank may have fewer than another: rows with an id of -1, which are dropped again.
    missing = most - len(own.ids_S)
    padded = (F.pad(part, (0, 0) * (part.ndim - 1) + (0, missing), value=-1) for part in own)
    joined = Features(*(gather_ranks(part).flatten(0, 1) for part in padded))
    order = joined.ids_S.argsort()[(joined.ids_S < 0).sum() :]
    return Features(*(part[order] for part in joined))
