"""What a frozen encoder knows: k nearest neighbours, logistic regression, and how well scores find the object."""

from .features import extract
from .knn import knn_accuracy
from .linear import logreg_accuracy
from .masks import object_leakage, object_patches, score_auroc

__all__ = ["extract", "knn_accuracy", "logreg_accuracy", "object_leakage", "object_patches", "score_auroc"]
