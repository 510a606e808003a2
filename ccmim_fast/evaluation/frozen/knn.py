"""Weighted k-nearest-neighbour classification of frozen features."""

# N training images, M test images of one chunk, D width, K neighbours, C classes, R ranks

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 2**28  # of one chunk's similarity matrix, so that memory does not grow with the test set


def knn_accuracy(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_ND: Tensor,
    test_labels_N: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """`knn_accuracies` of one k."""
    return knn_accuracies(train_ND, train_labels_N, test_ND, test_labels_N, (k,), temperature)[k]


def knn_accuracies(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_ND: Tensor,
    test_labels_N: Tensor,
    ks: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, float]:
    """Share of test images whose weighted vote of k neighbours names their class, for each k of `ks`.

    Similarity is the cosine; a neighbour votes for its label with weight exp(similarity / temperature). Equal votes go
    to the lower class index. Equivalent to comparing all test images with all training images at once. Where there are
    many ranks, all must ask: each looks through its own training images, and the neighbours of all are compared.

    Args:
        train_ND: float32 or float64, need not be normalised; of many ranks, this one's share.
        test_ND: likewise, all of them, on the same device.
        train_labels_N, test_labels_N: int64, >= 0.

    Returns:
        accuracy in 0..1, by k.

    Raises:
        ValueError: a k outside 1..N (of all ranks), a temperature that is not positive, no test image, or features with
            NaN.
    """
    counts_2 = _over_ranks(torch.tensor([len(train_ND), _largest(train_labels_N)], device=train_ND.device))
    total, classes = int(counts_2[:, 0].sum()), int(counts_2[:, 1].max()) + 1
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
    chunk = max(1, CHUNK_BYTES // (max(1, int(counts_2[:, 0].max())) * train_ND.element_size()))
    correct = dict.fromkeys(ks, 0)
    for query_MD, labels_M in zip(test_ND.split(chunk), test_labels_N.split(chunk)):
        similarity_MK, voted_MK = _nearest(F.normalize(query_MD, dim=1) @ bank_DN, train_labels_N, max(ks))
        # Relative to the nearest neighbour (topk sorts): the same winner, and exp cannot overflow at a small T.
        weight_MK = ((similarity_MK - similarity_MK[:, :1]) / temperature).exp()
        for k in ks:
            votes_MC = weight_MK.new_zeros(len(query_MD), classes)
            votes_MC.scatter_add_(1, voted_MK[:, :k], weight_MK[:, :k])
            correct[k] += int((votes_MC.argmax(dim=1) == labels_M).sum())
    return {k: count / len(test_ND) for k, count in correct.items()}


def _nearest(similarity_MN: Tensor, labels_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and labels [M, K] of the nearest, of all ranks; nearest first."""
    similarity_MK, nearest_MK = similarity_MN.topk(min(k, similarity_MN.shape[1]), dim=1)
    if not dist.is_initialized():
        return similarity_MK, labels_N[nearest_MK]
    missing = k - similarity_MK.shape[1]
    similarity_RMK = _over_ranks(F.pad(similarity_MK, (0, missing), value=-torch.inf))
    labels_RMK = _over_ranks(F.pad(labels_N[nearest_MK], (0, missing)))
    similarity_MK, order_MK = similarity_RMK.transpose(0, 1).flatten(1).topk(k, dim=1)
    return similarity_MK, labels_RMK.transpose(0, 1).flatten(1).gather(1, order_MK)


def _over_ranks(value: Tensor) -> Tensor:
    """[R, ...]: the value, of one shape everywhere, of each rank."""
    if not dist.is_initialized():
        return value[None]
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.contiguous())
    return torch.stack(values)


def _largest(labels_N: Tensor) -> int:
    return int(labels_N.max()) if len(labels_N) else 0
