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
    return collect(lambda batch: norm(pooled(encode(batch.images_BHWC).float(), prefix, pool)), batches, autocast)


def collect(
    encode: Callable[[Batch], Tensor], batches: Iterable[Batch], autocast: AbstractContextManager = _EXACT
) -> tuple[Tensor, Tensor | None]:
    """Return features [N, ...] of all images, float32 [B, ...] of each batch, and their labels, as `extract` does.

    `encode` is called under `inference_mode` and `autocast`. Raises DataError and NumericsError as `extract`.
    """
    features, labels = [], []
    for batch in batches:
        with torch.inference_mode(), autocast:
            features.append(encode(batch).cpu())
        labels.append(batch.labels_B)
    if not features:
        raise DataError("no images to encode: the source gave no batch")
    # Concatenated outside inference_mode: an inference tensor could not be saved for a backward pass later.
    features = torch.cat(features)
    finite_N = features.isfinite().flatten(1).all(dim=1)
    if not finite_N.all():
        raise NumericsError(f"features of {int((~finite_N).sum())} of {len(features)} images are not finite")
    return features, None if None in labels else torch.cat(labels).cpu()


class Features(NamedTuple):
    """This tuple holds features and labels of images in ascending order of their ids, on the CPU."""

    features_SD: Tensor  # float32
    labels_S: Tensor  # int64
    ids_S: Tensor  # int64


def features(job: Job, encoder: Encoder, images: Images) -> Features:
    """Return those of this rank's share, every `world_size`-th image; images that fail are left out."""
    pool = job.config.model.pool
    return own_features(
        job,
        images,
        encoder.width,
        lambda batch: encoder.norm(pooled(encoder(batch.images_BHWC).float(), encoder.prefix, pool)),
    )


def own_features(job: Job, images: Images, width: int, encode: Callable[[Batch], Tensor]) -> Features:
    """Return what `encode` makes of the batches of this rank's share, [B, `width`] each; see `collect`."""
    ids = []

    def noted(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            ids.append(torch.from_numpy(batch.host_ids_B))
            yield batch

    precision = choose_precision(job.config.train.precision, job.here.device)
    batches = noted(job.batches(images, _BATCH))
    first = next(batches, None)
    if first is None:  # fewer images than ranks, or none that can be read
        none = torch.zeros(0, dtype=torch.int64)
        return Features(torch.zeros(0, width), none, none)
    found = collect(encode, chain([first], batches), precision.autocast(job.here.device))
    return Features(*found, torch.cat(ids))


def features_of_all_ranks(job: Job, encoder: Encoder, images: Images) -> Features:
    """Return `features` of all images, on every rank. Raises DataError: none of them can be read."""
    return of_all_ranks(features(job, encoder, images), images)


def of_all_ranks(own: Features, images: Images) -> Features:
    """Join the ranks' features of their shares, on every rank. Raises DataError: none of the images can be read."""
    most = int(gather_ranks(torch.tensor([len(own.ids_S)])).max())
    if not most:
        raise DataError(f"none of the {usable_count(images.source)} images of {images.data.root!r} can be read")
    # A rank may have fewer than another: rows with an id of -1, which are dropped again.
    missing = most - len(own.ids_S)
    padded = (F.pad(part, (0, 0) * (part.ndim - 1) + (0, missing), value=-1) for part in own)
    joined = Features(*(gather_ranks(part).flatten(0, 1) for part in padded))
    order = joined.ids_S.argsort()[(joined.ids_S < 0).sum() :]
    return Features(*(part[order] for part in joined))
