"""Logistic regression on frozen features is the fast linear probe."""

# N images, D width

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ccmim_fast.errors import DataError
from ccmim_fast.evaluation.frozen.features import features_of_all_ranks
from ccmim_fast.evaluation.job import Job, Work
from ccmim_fast.ranks.session import broadcast

# Inverse strength of the L2 penalty, beside a sum over images. Weaker ones need more than 1000 iterations on the
# features of an untrained network and moved its accuracy by one point.
GRID = (1e-4, 1e-3, 1e-2, 1e-1)

_FOLDS = 5  # of which one is held out


def logreg(job: Job) -> Work:
    """Prepare the accuracy of a fit by the first rank."""
    encoder = job.frozen_encoder()

    def work() -> dict[str, float]:
        test, train = (features_of_all_ranks(job, encoder, images) for images in (job.test, job.train))
        check_classes(train.labels_S)
        parts = (train.features_SD, train.labels_S, test.features_SD, test.labels_S)
        accuracy = logreg_accuracy(*parts, job.config.logreg.c)[0] if job.here.is_main else None
        return {"accuracy": broadcast(accuracy)}

    return work


def check_classes(labels_N: Tensor) -> None:
    """Raise DataError if training images are of one class."""
    if len(labels_N.unique()) < 2:
        raise DataError("the training images that can be read are of one class alone")


def logreg_accuracy(
    train_ND: Tensor, train_labels_N: Tensor, test_ND: Tensor, test_labels_N: Tensor, cs: Sequence[float] = GRID
) -> tuple[float, float]:
    """Return the accuracy (0..1) of multinomial logistic regression on standardised features, and the C chosen.

    C is the one of `cs` with the best accuracy on held-out training images, see `held_out` (equal ones go to the
    smaller C, the stronger penalty); the fit is then repeated on all of them. Where no class has two images it is the
    smallest. Mean and standard deviation come from the images fitted. The test images take no part in any of it.
    Deterministic.

    Features are float, on the CPU, labels int64. Raises ValueError: features that are not finite, a C that is not
    positive, or one class only.
    """
    # A second, which those who only look at masks need not wait.
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    split = held_out(train_labels_N.numpy())
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": sorted(cs) if len(split[1]) else [min(cs)]},
        # Of one C alone any images will do.
        cv=[split if len(split[1]) else (split[0], split[0])],
        error_score="raise",
    )
    search.fit(train_ND.numpy(), train_labels_N.numpy())
    accuracy = search.score(test_ND.numpy(), test_labels_N.numpy())
    return float(accuracy), float(search.best_params_["logisticregression__C"])


def held_out(labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which images are fitted and which are held out, both int64.

    A fifth of each class that has five; of a class that has fewer one, if it has two.
    """
    from sklearn.model_selection import StratifiedKFold

    labels_N = np.unique(labels_N, return_inverse=True)[1]
    if np.bincount(labels_N).min() >= _FOLDS:
        folds = StratifiedKFold(n_splits=_FOLDS, shuffle=True, random_state=0)
        return next(folds.split(np.zeros((len(labels_N), 1)), labels_N))
    of_classes = [np.flatnonzero(labels_N == label) for label in range(labels_N.max() + 1)]
    held_H = np.concatenate([ids[: max(len(ids) // _FOLDS, len(ids) > 1)] for ids in of_classes])
    return np.setdiff1d(np.arange(len(labels_N)), held_H), held_H
