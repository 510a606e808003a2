"""Frozen features are measured on held-out images, which no run trains on."""

from dataclasses import replace

from ccmim_fast.config.schema import Config
from ccmim_fast.data.build import build_source
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.source import Source
from ccmim_fast.data.stream.torch_loader import evaluation_batches
from ccmim_fast.evaluation.frozen.features import extract
from ccmim_fast.evaluation.frozen.knn import knn_accuracies
from ccmim_fast.evaluation.frozen.logreg import logreg_accuracy
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.tokens import tokens_of

HELD_OUT = 1000  # images that no run trains on
NEIGHBOURS = 20  # of kNN, or all images where they are fewer


def make_held_out(config: Config) -> ShapesSource:
    """Make images of the training set's kind, drawn from another seed."""
    return build_source(replace(config.data, samples=HELD_OUT), config.seed + 1)


def measure_features(model: CCMIM, config: Config, held_out: Source) -> dict[str, float]:
    """Measure kNN and logistic regression of frozen, average-pooled features, fitted on the training images.

    Both sets must have labels, of the same classes.
    """
    encode, parts = tokens_of(model.encoder, model.mean_C, model.std_C), []
    for source in (build_source(config.data, config.seed), held_out):
        batches = evaluation_batches(source, config.data.image_size, config.train.batch_size, model.mean_C.device)
        parts += extract(encode, batches, model.encoder.num_prefix_tokens)
    k = min(NEIGHBOURS, len(parts[0]))
    return {"knn": knn_accuracies(*parts, [k])[k], "logreg": logreg_accuracy(*parts)[0]}
