"""Frozen features are classified by their weighted k nearest neighbours."""

# N training images, M test images of one chunk, D width, K neighbours, C classes, R ranks

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ccmim_fast.data.source import usable_count
from ccmim_fast.errors import ConfigError, DataError
from ccmim_fast.evaluation.frozen.features import features, features_of_all_ranks
from ccmim_fast.evaluation.job import Job, Work
from ccmim_fast.ranks.session import gather_ranks

CHUNK_BYTES = 2**28  # of one chunk's similarity matrix, so that memory does not grow with the test set


def knn(job: Job) -> Work:
    """Prepare accuracies by the number of neighbours."""
    check_k(job)
    config, images, encoder = job.config.knn, usable_count(job.train.source), job.frozen_encoder()

    def work() -> dict[str, float]:
        test = features_of_all_ranks(job, encoder, job.test)
        train = features(job, encoder, job.train)
        shares = (train.features_SD, train.labels_S, test.features_SD, test.labels_S)
        # Of images that turned out to be unreadable there are fewer neighbours.
        total = int(gather_ranks(torch.tensor([len(train.ids_S)])).sum())
        if not total:
            raise DataError(f"none of the {images} training images can be read")
        ks = sorted({min(k, total) for k in config.k})
        found = knn_accuracies(*(share.to(job.here.device) for share in shares), ks, config.temperature)
        return {f"k={k}": accuracy for k, accuracy in found.items()}

    return work


def check_k(job: Job) -> None:
    """Raise ConfigError if a job has fewer training images than `knn.k` neighbours."""
    most, images = max(job.config.knn.k), usable_count(job.train.source)
    if most > images:
        raise ConfigError(f"knn.k={most}: must be at most the {images} training images; nearest valid is {images}")


def knn_accuracies(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_ND: Tensor,
    test_labels_N: Tensor,
    ks: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, float]:
    """Return the share of test images whose weighted vote of k neighbours names their class, by k.

    Similarity is the cosine; a neighbour votes for its label with weight exp(similarity / temperature). Equal votes go
    to the lower class index. Equivalent to comparing all test images with all training images at once. Where there are
    many ranks, all must ask: each looks through its own training images, and the neighbours of all are compared.

    Features are float32 or float64 on one device, need not be normalised, and are this rank's share of the training
    images and all of the test images. Labels are int64, >= 0. Raises ValueError: a k outside 1..N (of all ranks), a
    temperature that is not positive, no test image, or features with NaN.
    """
    largest = int(train_labels_N.max()) if len(train_labels_N) else 0
    counts_R2 = gather_ranks(torch.tensor([len(train_ND), largest], device=train_ND.device))
    total, classes = int(counts_R2[:, 0].sum()), int(counts_R2[:, 1].max()) + 1
    for k in ks:
        if not 1 <= k <= total:
            raise ValueError(f"k={k} must be in 1..{total}, the number of training images")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    if len(test_ND) == 0:
        raise ValueError("no test image")
    if train_ND.isnan().any() or test_ND.isnan().any():
        raise ValueError("features hold NaN")
    bank_DN = F.normalize(train_ND, dim=1).T
    chunk = max(1, CHUNK_BYTES // (max(1, int(counts_R2[:, 0].max())) * train_ND.element_size()))
    correct = dict.fromkeys(ks, 0)
    for query_MD, labels_M in zip(test_ND.split(chunk), test_labels_N.split(chunk)):
        similarity_MK, voted_MK = _nearest(F.normalize(query_MD, dim=1) @ bank_DN, train_labels_N, max(ks))
        # Relative to the nearest neighbour (topk sorts): the same winner, and exp cannot overflow at a small T.
        weight_MK = ((similarity_MK - similarity_MK[:, :1]) / temperature).exp()
        for k in correct:
            votes_MC = weight_MK.new_zeros(len(query_MD), classes)
            votes_MC.scatter_add_(1, voted_MK[:, :k], weight_MK[:, :k])
            correct[k] += int((votes_MC.argmax(dim=1) == labels_M).sum())
    return {k: count / len(test_ND) for k, count in correct.items()}


def _nearest(similarity_MN: Tensor, labels_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return similarities and labels [M, K] of the nearest images of all ranks; nearest first."""
    similarity_MK, nearest_MK = similarity_MN.topk(min(k, similarity_MN.shape[1]), dim=1)
    if not dist.is_initialized():
        return similarity_MK, labels_N[nearest_MK]
    missing = k - similarity_MK.shape[1]
    similarity_RMK = gather_ranks(F.pad(similarity_MK, (0, missing), value=-torch.inf))
    labels_RMK = gather_ranks(F.pad(labels_N[nearest_MK], (0, missing)))
    similarity_MK, order_MK = similarity_RMK.transpose(0, 1).flatten(1).topk(k, dim=1)
    return similarity_MK, labels_RMK.transpose(0, 1).flatten(1).gather(1, order_MK)
