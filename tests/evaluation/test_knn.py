import math

import pytest
import torch

from ccmim_fast.evaluation.frozen import knn
from ccmim_fast.evaluation.frozen.knn import knn_accuracies


def knn_accuracy(*data, k=20, temperature=0.07):
    return knn_accuracies(*data, (k,), temperature)[k]


def brute_force(train, train_labels, test, test_labels, k, temperature):
    """The definition, pair by pair, in float64 Python numbers."""
    correct = 0
    for query, label in zip(test.double().tolist(), test_labels.tolist()):
        pairs = []
        for vector, other in zip(train.double().tolist(), train_labels.tolist()):
            dot = sum(a * b for a, b in zip(query, vector))
            pairs.append((dot / math.hypot(*query) / math.hypot(*vector), other))
        votes = {}
        for similarity, other in sorted(pairs, reverse=True)[:k]:
            votes[other] = votes.get(other, 0.0) + math.exp(similarity / temperature)
        correct += max(votes, key=votes.get) == label
    return correct / len(test)


def made(n_train=60, n_test=97, classes=4, width=3):
    """Classes that overlap and differ in size, so that k and the weights change the accuracy."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator)
    labels = (classes * torch.rand(n_train + n_test, generator=generator) ** 2).long()
    features = centres[labels] + 0.7 * torch.randn(len(labels), width, generator=generator)
    return features[:n_train], labels[:n_train], features[n_train:], labels[n_train:]


@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_brute_force(k, temperature):
    data = made()
    assert knn_accuracy(*data, k=k, temperature=temperature) == brute_force(*data, k, temperature)


def test_the_cases_tell_weights_and_k_apart():
    data = made()
    assert len({brute_force(*data, k, t) for k, t in [(1, 0.07), (7, 0.07), (7, 1.0), (60, 0.07), (60, 1.0)]}) == 5


def test_chunks_change_nothing(monkeypatch):
    data = made()
    whole = knn_accuracy(*data, k=7)
    monkeypatch.setattr(knn, "CHUNK_BYTES", 4 * 60 * 10)  # ten test images a chunk, seven in the last
    assert knn_accuracy(*data, k=7) == whole


def test_length_of_a_feature_does_not_matter():
    train, labels, test, test_labels = made()
    scale = torch.linspace(0.1, 50, len(train))[:, None]
    assert knn_accuracy(train * scale, labels, test, test_labels) == knn_accuracy(train, labels, test, test_labels)


def test_small_temperature_does_not_overflow():
    data = made()
    assert knn_accuracy(*data, k=20, temperature=1e-3) == brute_force(*data, 1, 1.0)


def test_errors():
    train, labels, test, test_labels = made()
    with pytest.raises(ValueError, match=r"k=61 must be in 1\.\.60"):
        knn_accuracy(train, labels, test, test_labels, k=61)
    with pytest.raises(ValueError, match="temperature=0 must be above 0"):
        knn_accuracy(train, labels, test, test_labels, temperature=0)
    with pytest.raises(ValueError, match="no test image"):
        knn_accuracy(train, labels, test[:0], test_labels[:0])
    with pytest.raises(ValueError, match="NaN"):
        knn_accuracy(train, labels, test * torch.nan, test_labels)
    with pytest.raises(ValueError, match="NaN"):
        knn_accuracy(train * torch.nan, labels, test, test_labels)
