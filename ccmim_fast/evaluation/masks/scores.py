"""A model scores images by every source and divides them by every strategy."""

# B images, b of one chunk, H height, W width, C channels, L patches, D width

import math
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from ccmim_fast.build.model import build_objective, build_score_source
from ccmim_fast.config.schema import Config
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.evaluation.masks.objects import object_leakage, score_auroc
from ccmim_fast.models.ccmim import CCMIM, Output
from ccmim_fast.models.scores import AllBlocks, PriorScores, eq4_of_blocks
from ccmim_fast.registry import SCORE_SOURCES
from ccmim_kernels import sample_partition
from ccmim_kernels.sample_partition import STRATEGIES

CHUNK = 32  # images at a time: 1 GB of activations at ViT-B and 224 pixels


class Scored(NamedTuple):
    """This tuple holds images as a model scores and divides them, on the CPU; the noise is that of epoch 0."""

    source: str  # of the scores that the masks are drawn by
    # By source (`all blocks`, `block 0` and so on, `bank`, others by their labels): [B, L], each row sums to 1.
    scores: dict[str, Tensor]
    masks: dict[str, Tensor]  # by strategy: [B, L] bool, True where masked
    recons: dict[str, float]  # L_recons (Eq. 9) by strategy; nothing without a decoder


@torch.inference_mode()
def score_and_divide(
    model: CCMIM, config: Config, batch: Batch, prior: PriorScores | None, decodes: bool = True
) -> Scored:
    """Score the images by every source, and divide them by every strategy; no step is taken.

    The masks are drawn by the source that the settings name; by all blocks for a bank that knows nothing. The model is
    in evaluation mode, the batch on its device; `prior` is what the run's bank says of the images, if it does;
    `decodes` tells whether the model's decoder is trained.
    """
    names = {"first": "block 0", "block": f"block {config.score.block}"} | ({} if prior is None else {"bank": "bank"})
    named = SCORE_SOURCES[config.score.source]
    source = names.get(config.score.source, "all blocks" if named.has_bank else named.label)
    own = build_score_source(config, model.encoder)
    objective, count = build_objective(config, model), len(batch.ids_B)
    scores, masks, losses = defaultdict(list), defaultdict(list), defaultdict(float)
    for start in range(0, count, CHUNK):
        chunk = slice(start, start + CHUNK)
        images_bHWC, ids_b = batch.images_BHWC[chunk], batch.ids_B[chunk]
        prior_b = None if prior is None else PriorScores(*(part[chunk] for part in prior))
        logits = _logits(model, images_bHWC, ids_b, prior_b)
        if source not in logits:
            logits[source] = own(model.encoder, model.embed(images_bHWC))
        for name, logits_bL in logits.items():
            scores[name].append(logits_bL.float().softmax(1).cpu())
        for strategy in STRATEGIES:
            sampling = {**model.sampling, "strategy": strategy}
            partition = sample_partition(logits[source], ids_b, epoch=0, kernels=model.kernels, **sampling)
            masks[strategy].append(partition.mask_BL.cpu())
            if decodes:
                output = Output(model.predict(images_bHWC, partition), partition, None, None, None)
                losses[strategy] += len(ids_b) / count * float(objective.recons(output, images_bHWC))
    whole_scores, whole_masks = ({k: torch.cat(parts) for k, parts in found.items()} for found in (scores, masks))
    return Scored(source, whole_scores, whole_masks, dict(losses))


def _logits(model: CCMIM, images_bHWC: Tensor, ids_b: Tensor, prior: PriorScores | None) -> dict[str, Tensor]:
    """Return log s [b, L] by source, each up to a constant per row."""
    x_bLD = model.embed(images_bHWC)
    found = {"all blocks": AllBlocks(model.encoder)(model.encoder, x_bLD)}
    found |= {f"block {i}": one for i, one in enumerate(eq4_of_blocks(model.encoder, x_bLD))}
    if prior is not None:
        found["bank"] = model.divide(x_bLD, ids_b, 0, prior=prior).logits
    return found


def figures_of(scored: Scored, object_BL: Tensor | None) -> dict[str, float]:
    """Return the figures of the scores that the masks are drawn by, and of each strategy; `object_BL` as in `write`."""
    figures = of_scores(scored.scores[scored.source], object_BL)
    if object_BL is not None:
        figures |= {f"leakage, {name}": object_leakage(mask_BL, object_BL) for name, mask_BL in scored.masks.items()}
    return figures | {f"recons, {strategy}": loss for strategy, loss in scored.recons.items()}


def of_scores(scores_BL: Tensor, object_BL: Tensor | None) -> dict[str, float]:
    """Return AUROC where the objects are known, entropy as a share of log L, share of the top quarter."""
    auroc = {} if object_BL is None else {"auroc": score_auroc(scores_BL, object_BL)}
    return auroc | {"entropy": score_entropy(scores_BL), "top quarter": top_share(scores_BL)}


def score_entropy(scores_BL: Tensor) -> float:
    """Return the mean entropy of scores that sum to 1, as a share of log L: 1 = all patches alike, 0 = all on one."""
    return float(torch.special.entr(scores_BL.double()).sum(1).mean()) / math.log(scores_BL.shape[1])


def top_share(scores_BL: Tensor, share: float = 0.25) -> float:
    """Return the mean sum of the scores of each image's highest patches; `share` itself where all are alike.

    Scores of an image sum to 1; the share of its patches is rounded down, but one at least.
    """
    count = max(1, int(scores_BL.shape[1] * share))
    return float(scores_BL.double().topk(count, dim=1).values.sum(1).mean())
