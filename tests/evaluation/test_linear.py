import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.model_selection import StratifiedKFold

from ccmim_fast.evaluation.frozen.logreg import held_out, logreg_accuracy


def made(n=150, classes=3, width=8, spread=1.5):
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.randint(classes, (2 * n,), generator=generator)
    features = centres[labels] + spread * torch.randn(len(labels), width, generator=generator)
    # One column on a scale of its own: without standardising, the penalty would fall on it alone.
    features[:, 0] = features[:, 0] * 1e-3 + 5
    return features[:n], labels[:n], features[n:], labels[n:]


def by_hand(train, labels, test, test_labels, c):
    """argmin of sum of cross-entropies + |W|^2 / (2 C) on standardised features, in float64."""
    x, t = train.double().numpy(), test.double().numpy()
    mean, std = x.mean(0), x.std(0)
    x, t = (x - mean) / std, (t - mean) / std
    y = np.eye(3)[labels]

    def loss(flat):
        weight, bias = flat[:-3].reshape(-1, 3), flat[-3:]
        logits = x @ weight + bias
        logits -= logits.max(1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        slope = np.exp(log_p) - y
        gradient = np.concatenate([(x.T @ slope + weight / c).ravel(), slope.sum(0)])
        return -(y * log_p).sum() + (weight**2).sum() / (2 * c), gradient

    best = minimize(loss, np.zeros(x.shape[1] * 3 + 3), jac=True, method="L-BFGS-B", options={"maxiter": 5000}).x
    return float(((t @ best[:-3].reshape(-1, 3) + best[-3:]).argmax(1) == test_labels.numpy()).mean())


@pytest.mark.parametrize("c", [1e-3, 0.1, 10.0])
def test_equals_the_penalised_likelihood_by_hand(c):
    data = made()
    accuracy, best = logreg_accuracy(*data, cs=(c,))
    assert best == c
    # One image in 150 may sit on the boundary within the optimiser's tolerance.
    assert abs(accuracy - by_hand(*data, c)) <= 1 / 150 + 1e-9


def test_standardises():
    train, labels, test, test_labels = made()
    scale = torch.logspace(-4, 4, train.shape[1])
    assert logreg_accuracy(train * scale, labels, test * scale, test_labels) == pytest.approx(
        logreg_accuracy(train, labels, test, test_labels), abs=1 / 150
    )


def test_c_does_not_depend_on_the_test_images():
    train, labels, test, test_labels = made()
    _, chosen = logreg_accuracy(train, labels, test, test_labels)
    _, with_wrong_labels = logreg_accuracy(train, labels, test, (test_labels + 1) % 3)
    _, with_noise = logreg_accuracy(train, labels, torch.randn_like(test), test_labels)
    assert chosen == with_wrong_labels == with_noise


def test_chooses_on_a_held_out_fifth_of_the_training_images():
    """On the images fitted, 1e4 is the best: it gets all of them right."""
    generator = torch.Generator().manual_seed(2)
    labels = (torch.rand(600, generator=generator) * 1.6).long()
    features = torch.randn(600, 60, generator=generator)
    features[:, 0] += labels * 1.5
    train, train_labels, test, test_labels = features[:120], labels[:120], features[120:], labels[120:]
    fit, held = next(StratifiedKFold(5, shuffle=True, random_state=0).split(train, train_labels))
    cs = (1e-9, 1e-2, 1e4)
    on_held = [logreg_accuracy(train[fit], train_labels[fit], train[held], train_labels[held], (c,))[0] for c in cs]
    accuracy, best = logreg_accuracy(train, train_labels, test, test_labels, cs[::-1])
    assert len(held) == 24
    assert best == cs[on_held.index(max(on_held))] != 1e4
    assert accuracy == logreg_accuracy(train, train_labels, test, test_labels, (best,))[0]


def test_is_deterministic_and_takes_the_smaller_of_equals():
    labels = torch.arange(60) % 3
    features = torch.eye(3)[labels] + 0.01 * torch.randn(60, 3, generator=torch.Generator().manual_seed(3))
    first = logreg_accuracy(features, labels, features, labels, cs=(10.0, 1.0))
    assert first == logreg_accuracy(features, labels, features, labels, cs=(10.0, 1.0)) == (1.0, 1.0)


def test_a_class_with_one_image_is_no_error():
    train, labels, test, test_labels = made()
    labels = labels.clone()
    labels[0] = 3
    assert logreg_accuracy(train, labels, test, test_labels)[0] > 0.5


@pytest.mark.parametrize("shots", [1, 2, 3, 4])
def test_a_few_images_of_each_class_are_enough(shots):
    train, labels, test, test_labels = made()
    few = torch.cat([torch.nonzero(labels == label)[:shots, 0] for label in range(3)])
    accuracy, chosen = logreg_accuracy(train[few], labels[few], test, test_labels, cs=(1.0, 0.01))
    assert accuracy > 0.4
    assert chosen == 0.01 or shots > 1


@pytest.mark.parametrize(
    ("counts", "held"),
    [((5, 10), [1, 2]), ((1, 1, 1), [0, 0, 0]), ((1, 2, 4, 11), [0, 1, 1, 2]), ((0, 3, 1), [0, 1, 0])],
)
def test_what_is_held_out_leaves_some_of_each_class(counts, held):
    labels = np.repeat(np.arange(len(counts)), counts)
    fitted_F, held_H = held_out(labels)
    assert sorted([*fitted_F, *held_H]) == list(range(len(labels)))
    assert [int((labels[held_H] == label).sum()) for label in range(len(counts))] == held


def test_errors():
    train, labels, test, test_labels = made()
    with pytest.raises(ValueError, match="'C' parameter"):
        logreg_accuracy(train, labels, test, test_labels, cs=(-1.0, 1.0))
    train[3, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        logreg_accuracy(train, labels, test, test_labels)
