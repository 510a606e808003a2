"""Weighted k-nearest-neighbour classification of frozen features."""

# N training images, M test images of one chunk, D width, K neighbours, C classes

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
    """Share of test images whose weighted vote of `k` neighbours names their class.

    Similarity is the cosine; a neighbour votes for its label with weight exp(similarity / temperature). Equal votes go
    to the lower class index. Equivalent to comparing all test images with all training images at once.

    Args:
        train_ND, test_ND: float32 or float64, same device; need not be normalised.
        train_labels_N, test_labels_N: int64, >= 0.

    Returns:
        accuracy in 0..1.

    Raises:
        ValueError: `k` outside 1..N, a temperature that is not positive, no test image, or features with NaN.
    """
    if not 1 <= k <= len(train_ND):
        raise ValueError(f"k={k} must be in 1..{len(train_ND)}, the number of training images")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    if len(test_ND) == 0:
        raise ValueError("no test image")
    if train_ND.isnan().any() or test_ND.isnan().any():
        raise ValueError("features hold NaN")
    classes = int(train_labels_N.max()) + 1
    bank_DN = F.normalize(train_ND, dim=1).T
    chunk = max(1, CHUNK_BYTES // (len(train_ND) * train_ND.element_size()))
    correct = 0
    for query_MD, labels_M in zip(test_ND.split(chunk), test_labels_N.split(chunk)):
        similarity_MK, nearest_MK = (F.normalize(query_MD, dim=1) @ bank_DN).topk(k, dim=1)
        # Relative to the nearest neighbour (topk sorts): the same winner, and exp cannot overflow at a small T.
        weight_MK = ((similarity_MK - similarity_MK[:, :1]) / temperature).exp()
        votes_MC = weight_MK.new_zeros(len(query_MD), classes).scatter_add_(1, train_labels_N[nearest_MK], weight_MK)
        correct += int((votes_MC.argmax(dim=1) == labels_M).sum())
    return correct / len(test_ND)
