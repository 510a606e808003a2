"""The score sources: how much [CLS] attends to each patch (Eq. 4), read at the first block, at one, at all, or kept.

Each class is a line of `registry.SCORE_SOURCES`. It is built with the encoder, which it checks, and with settings of
the section `score` as keyword arguments; it is called with embedded patches and has no gradient.
"""

# B batch, L patches, T = P + L tokens, D width

import math
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ccmim_fast.errors import ConfigError
from ccmim_fast.models.block import ViTBlock
from ccmim_fast.models.eva import EvaViTBlock
from ccmim_fast.models.tokens import eps_of, prefix_tokens, rotary_tables, with_prefix
from ccmim_fast.models.watched import cls_attention, watched
from ccmim_kernels import folded_logits


class PriorScores(NamedTuple):
    """The scores that a bank has of the patches before they are divided."""

    scores_BL: Tensor  # as `Output.cls_attention_BL`, 0 where nothing is known
    known_BL: Tensor  # the share of each score that is known, 0 .. 1; for the rest 0 is assumed


class ScoreSource:
    """The base of all score sources."""

    read_blocks = 0  # of the last blocks, in which both training passes read [CLS]'s attention

    def __init__(self, vit: VisionTransformer):
        """Take the encoder; a source raises ConfigError for one that it cannot score by."""

    def direction(self, vit: VisionTransformer) -> Tensor | None:
        """Return v [D] where the source wants logits_i = LN(x_i) . v, which `embed_tokens` computes; else None."""
        return None

    def logits(self, vit: VisionTransformer, x_BLD: Tensor) -> Tensor:
        """Compute what the call returns from the embedded patches alone."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self, vit: VisionTransformer, x_BLD: Tensor, prior: PriorScores | None = None, folded_BL: Tensor | None = None
    ) -> Tensor:
        """Return logits [B, L] of embedded patches without gradient: Eq. 4 but for its softmax and a constant per row.

        `prior` is what a bank says of the patches, `folded_BL` the logits by `direction` where they were computed.
        """
        return self.logits(vit, x_BLD) if folded_BL is None else folded_BL


class OneBlock(ScoreSource):
    """Eq. 4 at one block, before which the others run without gradient."""

    def __init__(self, vit: VisionTransformer, *, block: int = 0):
        if not 0 <= block < len(vit.blocks):
            raise ConfigError(f"score.block={block} must be in 0..{len(vit.blocks) - 1}")
        self.block = block

    def logits(self, vit: VisionTransformer, x_BLD: Tensor) -> Tensor:
        x_BTD, at = vit.norm_pre(with_prefix(vit, x_BLD)), rotary_tables(vit)
        for earlier, rotation in zip(vit.blocks[: self.block], at):
            x_BTD = earlier(x_BTD, **rotation)
        return cls_attention(vit.blocks[self.block], x_BTD, vit.num_prefix_tokens, "logits", **at[self.block])


class FirstBlock(OneBlock):
    """Eq. 4 at the first block: one vector in place of all keys, where the encoder allows it."""

    def __init__(self, vit: VisionTransformer):
        super().__init__(vit, block=0)

    @torch.no_grad()
    def direction(self, vit: VisionTransformer) -> Tensor | None:
        # Detached: [CLS] without registers and position is a view of its weight, which would ask for a gradient.
        return vit.blocks[0].folded_direction(prefix_tokens(vit)[None, :1].detach()) if can_fold(vit) else None

    def logits(self, vit: VisionTransformer, x_BLD: Tensor) -> Tensor:
        direction_D = self.direction(vit)
        if direction_D is None:
            return super().logits(vit, x_BLD)
        return folded_logits(x_BLD, direction_D, eps_of(vit))


class AllBlocks(ScoreSource):
    """The mean over all blocks and heads of [CLS]'s softmaxed row, by a pass without gradient.

    `normalise` is `renorm` (renormalised over patches) or `softmax` (sum over blocks, softmax again: authors' code).
    """

    def __init__(self, vit: VisionTransformer, *, normalise: str = "renorm"):
        self.normalise = normalise

    def logits(self, vit: VisionTransformer, x_BLD: Tensor) -> Tensor:
        x_BTD, total_BL = vit.norm_pre(with_prefix(vit, x_BLD)), None
        *others, last = zip(vit.blocks, rotary_tables(vit))
        for block, rotation in others:
            if isinstance(block, ViTBlock):
                x_BTD, total_BL = block(x_BTD, reads_cls=True, total_BL=total_BL, **rotation)
            else:
                x_BTD, total_BL = watched(block, x_BTD, vit.num_prefix_tokens, "softmax", total_BL, **rotation)
        # Nothing follows the last block's keys.
        block, rotation = last
        total_BL = cls_attention(block, x_BTD, vit.num_prefix_tokens, "softmax", total_BL, **rotation)
        # Up to a constant per row: renormalising subtracts log sum; a second softmax takes the sums as logits.
        return total_BL.log() if self.normalise == "renorm" else total_BL


class Bank(ScoreSource):
    """The scores that earlier steps saw in their two training passes, kept per sample by `ccmim_fast.bank`.

    Attention is averaged over the last `blocks`, 0: all. Patches that no crop has covered yet are scored by `unseen`:
    `random`, or Eq. 4 at the `first` block.
    """

    def __init__(self, vit: VisionTransformer, *, blocks: int = 0, unseen: str = "first"):
        if blocks > len(vit.blocks):
            raise ConfigError(f"score.blocks={blocks} must be in 0..{len(vit.blocks)}, the encoder's; 0 is all")
        self.read_blocks = blocks or len(vit.blocks)
        self.unseen = FirstBlock(vit) if unseen == "first" else None

    def direction(self, vit: VisionTransformer) -> Tensor | None:
        return None if self.unseen is None else self.unseen.direction(vit)

    def __call__(
        self, vit: VisionTransformer, x_BLD: Tensor, prior: PriorScores | None = None, folded_BL: Tensor | None = None
    ) -> Tensor:
        if prior is None:
            nothing_BL = torch.zeros(x_BLD.shape[:2], device=x_BLD.device)
            prior = PriorScores(nothing_BL, nothing_BL)
        if self.unseen is None:
            return prior.scores_BL
        logits_BL = self.unseen(vit, x_BLD, folded_BL=folded_BL)
        # As shares, so that both are of one kind: log of the softmax, times the patches there are.
        guess_BL = logits_BL.log_softmax(1) + math.log(logits_BL.shape[1])
        return prior.scores_BL + (1 - prior.known_BL) * guess_BL


def can_fold(vit: VisionTransformer) -> bool:
    """Return whether Eq. 4 at the first block is LN(x_i) . v.

    So it is with a LayerNorm alone before the block, and keys as they are: without norm or rotation.
    """
    first = vit.blocks[0]
    if not isinstance(first, ViTBlock) or isinstance(first, EvaViTBlock):
        return False
    plain = isinstance(first.attn.k_norm, nn.Identity) and isinstance(vit.norm_pre, nn.Identity)
    return plain and isinstance(first.norm1, nn.LayerNorm)


@torch.no_grad()
def eq4_of_blocks(vit: VisionTransformer, x_BLD: Tensor) -> list[Tensor]:
    """Compute Eq. 4's logits [B, L] at every block in one pass, from embedded patches."""
    found, x_BTD = [], vit.norm_pre(with_prefix(vit, x_BLD))
    for block, rotation in zip(vit.blocks, rotary_tables(vit)):
        found.append(cls_attention(block, x_BTD, vit.num_prefix_tokens, "logits", **rotation))
        x_BTD = block(x_BTD, **rotation)
    return found
