"""What a model makes of given images: the scores of every source, and their division by every strategy."""

# B images, H height, W width, C channels, L patches, D width

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ccmim_fast.build.model import build_objective
from ccmim_fast.config.schema import Config
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.evaluation.masks.metrics import object_leakage, score_auroc, score_entropy, top_share
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.output import Output
from ccmim_fast.models.scores import AllBlocks, PriorScores, eq4_of_blocks
from ccmim_kernels import STRATEGIES, sample_partition

CHUNK = 32  # images at a time: 1 GB of activations at ViT-B and 224 pixels


class Scored(NamedTuple):
    """Images as a model scores and divides them, on the CPU; the noise is that of epoch 0.

    Attributes:
        source: of the scores that the masks are drawn by.
        scores: by source, [B, L], each row sums to 1: `all blocks`, `block 0` and so on (Eq. 4 there), `bank`.
        masks: by strategy, [B, L] bool, True where masked.
        recons: L_recons (Eq. 9) by strategy; nothing without a decoder.
    """

    source: str
    scores: dict[str, Tensor]
    masks: dict[str, Tensor]
    recons: dict[str, float]

    def of(self, rows: Sequence[int]) -> "Scored":
        """The same of some of the images; the losses stay those of all."""
        scores, masks = ({name: of_all[rows] for name, of_all in part.items()} for part in (self.scores, self.masks))
        return Scored(self.source, scores, masks, self.recons)


def source_of(config: Config, known: PriorScores | None) -> str:
    """The source that a run's settings name, as `Scored` does; all blocks for a bank that knows nothing."""
    names = {
        "first": "block 0",
        "block": f"block {config.score.block}",
        "bank": "all blocks" if known is None else "bank",
    }
    return names.get(config.score.source, "all blocks")


@torch.inference_mode()
def score_and_divide(
    model: CCMIM, config: Config, batch: Batch, known: PriorScores | None, decodes: bool = True
) -> Scored:
    """Score the images by every source, and divide them by every strategy, as often as these are: no step is taken.

    Args:
        model: in evaluation mode.
        batch: on the model's device.
        known: what the run's bank says of the images, if it does.
        decodes: whether the model's decoder is trained.
    """
    source, parts = source_of(config, known), []
    for start in range(0, len(batch.ids_B), CHUNK):
        few = slice(start, start + CHUNK)
        known_here = None if known is None else PriorScores(*(of_all[few] for of_all in known))
        parts.append(_of_few(model, config, batch.images_BHWC[few], batch.ids_B[few], source, known_here, decodes))
    scores, masks, losses, counts = zip(*parts)
    weights = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    return Scored(
        source,
        {name: torch.cat([part[name] for part in scores]) for name in scores[0]},
        {name: torch.cat([part[name] for part in masks]) for name in masks[0]},
        {name: float(weights @ torch.tensor([part[name] for part in losses]).double()) for name in losses[0]},
    )


def _of_few(
    model: CCMIM,
    config: Config,
    images_BHWC: Tensor,
    ids_B: Tensor,
    source: str,
    known: PriorScores | None,
    decodes: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float], int]:
    logits = _logits(model, images_BHWC, ids_B, known)
    masks, losses = {}, {}
    for strategy in STRATEGIES:
        sampling = {**model.sampling, "strategy": strategy}
        partition = sample_partition(logits[source], ids_B, epoch=0, kernels=model.kernels, **sampling)
        masks[strategy] = partition.mask_BL.cpu()
        if decodes:
            output = Output(model.predict(images_BHWC, partition), partition, None, None, None)
            losses[strategy] = float(build_objective(config, model).recons(output, images_BHWC))
    scores = {name: logits_BL.float().softmax(1).cpu() for name, logits_BL in logits.items()}
    return scores, masks, losses, len(ids_B)


def _logits(model: CCMIM, images_BHWC: Tensor, ids_B: Tensor, known: PriorScores | None) -> dict[str, Tensor]:
    """log s [B, L] by source, each up to a constant per row."""
    x_BLD = model.embed(images_BHWC)
    found = {"all blocks": AllBlocks(model.encoder)(model.encoder, x_BLD).logits_BL}
    found |= {f"block {i}": one for i, one in enumerate(eq4_of_blocks(model.encoder, x_BLD))}
    if known is not None:
        found["bank"] = model.divide(x_BLD, ids_B, 0, prior=known).logits
    return found


def figures_of(scored: Scored, object_BL: Tensor | None, ratio: float) -> dict[str, float]:
    """Figures of the scores that the masks are drawn by, and of each strategy.

    Args:
        object_BL: bool, patches that show the object; None where that is not known.
        ratio: share of patches masked.

    Raises:
        ValueError: no image with both object and background patches.
    """
    figures = of_scores(scored.scores[scored.source], object_BL)
    if object_BL is not None:
        for strategy, mask_BL in scored.masks.items():
            figures[f"leakage, {strategy}"] = object_leakage(mask_BL, object_BL, ratio)
    return figures | {f"recons, {strategy}": loss for strategy, loss in scored.recons.items()}


def of_scores(scores_BL: Tensor, object_BL: Tensor | None) -> dict[str, float]:
    """AUROC against the objects where they are known, entropy as a share of log L, share of the top quarter."""
    auroc = {} if object_BL is None else {"auroc": score_auroc(scores_BL, object_BL)}
    return auroc | {"entropy": score_entropy(scores_BL), "top quarter": top_share(scores_BL)}
