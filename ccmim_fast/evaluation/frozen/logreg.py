"""Logistic regression on frozen features is the fast linear probe."""

# N images, D width

from collections.abc import Sequence

from torch import Tensor

from ccmim_fast.evaluation.frozen.features import features_of_all_ranks
from ccmim_fast.evaluation.job import Job
from ccmim_fast.ranks.session import broadcast

# Inverse strength of the L2 penalty, beside a sum over images. Weaker ones need more than 1000 iterations on the
# features of an untrained network and moved its accuracy by one point.
GRID = (1e-4, 1e-3, 1e-2, 1e-1)


def logreg(job: Job) -> dict[str, float]:
    """Return the accuracy of a fit by the first rank."""
    parts = (*features_of_all_ranks(job, job.train), *features_of_all_ranks(job, job.test))
    accuracy = logreg_accuracy(*parts, job.config.logreg.c)[0] if job.here.is_main else None
    return {"accuracy": broadcast(accuracy)}


def logreg_accuracy(
    train_ND: Tensor, train_labels_N: Tensor, test_ND: Tensor, test_labels_N: Tensor, cs: Sequence[float] = GRID
) -> tuple[float, float]:
    """Return the accuracy (0..1) of multinomial logistic regression on standardised features, and the C chosen.

    C is the one of `cs` with the best accuracy on a held-out fifth of the training images (stratified, fixed split;
    equal ones go to the smaller C, the stronger penalty); the fit is then repeated on all of them. Mean and standard
    deviation come from the images fitted. The test images take no part in any of it. Deterministic.

    Features are float, on the CPU, labels int64. Raises ValueError: features that are not finite, a C that is not
    positive, one class only, or no class with five training images.
    """
    # A second, which those who only look at masks need not wait.
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedKFold(n_splits=5, shuffle=True, random_state=0)
    held_out_split = next(folds.split(train_ND.numpy(), train_labels_N.numpy()))
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": sorted(cs)},
        cv=[held_out_split],
        error_score="raise",
    )
    search.fit(train_ND.numpy(), train_labels_N.numpy())
    accuracy = search.score(test_ND.numpy(), test_labels_N.numpy())
    return float(accuracy), float(search.best_params_["logisticregression__C"])
