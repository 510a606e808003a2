"""How much [CLS] attends to each patch (Eq. 4), read at the first block, at one block, or at all of them.

What the two training passes themselves show of it is read by `encoder.encode_and_read` and kept in a `bank`.
"""

# B batch, L patches, P prefix tokens, T = P + L tokens, N heads, H head dim, D width

from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ccmim_fast.errors import ConfigError
from ccmim_fast.models.blocks import PLAIN, BlockRunner, RowReader, inside, is_plain, keys, queries
from ccmim_fast.models.embedding import prefix_tokens
from ccmim_kernels import cls_row


class Score(NamedTuple):
    """Eq. 4 before its softmax: either logits [B, L], or the direction v [D] with logits_i = LN(x_i) . v."""

    logits_BL: Tensor | None
    direction_D: Tensor | None


def check_scores(vit: VisionTransformer, source: str, block: int, read_blocks: int = 0) -> None:
    """Raise ConfigError where this encoder's attention cannot be read as `source` asks."""
    if not all(is_plain(b) for b in vit.blocks):
        kind = type(vit.blocks[0]).__name__
        raise ConfigError(f"score.source={source}: the encoder's {kind} has no attention map; use mask.strategy=random")
    if source == "block" and not 0 <= block < len(vit.blocks):
        raise ConfigError(f"score.block={block} must be in 0..{len(vit.blocks) - 1}")
    if source == "bank" and read_blocks > len(vit.blocks):
        raise ConfigError(f"score.blocks={read_blocks} must be in 0..{len(vit.blocks)}, the encoder's; 0 is all")


@torch.no_grad()
def score(
    vit: VisionTransformer,
    x_BLD: Tensor,
    source: str,
    block: int,
    normalise: str,
    *,
    fold: bool = True,
    cls_only: bool = True,
    kernels: str = "auto",
    run: BlockRunner = PLAIN,
) -> Score:
    """Scores of embedded patches `x_BLD` (with positions, before the blocks); no gradient.

    Args:
        source: `first` (Eq. 4 at block 0), `block` (Eq. 4 at block `block`), `all` (mean over blocks of the softmaxed
            [CLS] row).
        normalise: for `all`, `renorm` (renormalised over patches) or `softmax` (sum over blocks, softmax again).
        fold: for `first`, one vector for `divide_tokens` in place of logits from all keys.
        cls_only: for `all`, compute the last block's [CLS] row alone.
        kernels: which implementation of the ops runs, see `ccmim_kernels.dispatch`.
        run: how the blocks are run.
    """
    if source == "first" and fold and can_fold(vit):
        return Score(None, folded_direction(vit))
    x_BTD = _entering(vit, x_BLD)
    if source == "all":
        return Score(_all_blocks(vit, x_BTD, normalise, cls_only, kernels, run), None)
    index = 0 if source == "first" else block
    for earlier in vit.blocks[:index]:
        x_BTD = run(earlier, x_BTD)
    return Score(eq4_logits(vit, index, x_BTD, kernels), None)


def eq4_logits(vit: VisionTransformer, block: int, x_BTD: Tensor, kernels: str = "auto") -> Tensor:
    """E_h[q_0 K_{1:}^T / sqrt(H)] [B, L] at one block, from the tokens that enter it (Eq. 4)."""
    q_B1NH, k_BTNH = inside(vit.blocks[block], _cls_and_keys, x_BTD)
    scale = vit.blocks[block].attn.scale
    return cls_row(q_B1NH[:, 0], k_BTNH, prefix=vit.num_prefix_tokens, kind="logits", scale=scale, kernels=kernels)


@torch.no_grad()
def eq4_of_blocks(
    vit: VisionTransformer, x_BLD: Tensor, kernels: str = "auto", run: BlockRunner = PLAIN
) -> list[Tensor]:
    """`eq4_logits` [B, L] of every block in one pass, from embedded patches (with positions, before the blocks)."""
    found, x_BTD = [], _entering(vit, x_BLD)
    for index, block in enumerate(vit.blocks):
        found.append(eq4_logits(vit, index, x_BTD, kernels))
        x_BTD = run(block, x_BTD)
    return found


def _entering(vit: VisionTransformer, x_BLD: Tensor) -> Tensor:
    """What enters the first block [B, T, D]."""
    prefix_BPD = prefix_tokens(vit).to(x_BLD.dtype).expand(len(x_BLD), -1, -1)
    return vit.norm_pre(torch.cat([prefix_BPD, x_BLD], dim=1))


def _cls_and_keys(block: Block, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """The query of [CLS] [B, 1, N, H] and the keys [B, T, N, H] of the tokens that enter a block."""
    normed_BTD = block.norm1(x_BTD)
    return queries(block.attn, normed_BTD[:, :1]), keys(block.attn, normed_BTD)


def can_fold(vit: VisionTransformer) -> bool:
    """Whether Eq. 4 at the first block is LN(x_i) . v: a LayerNorm before it, and no norm of queries and keys."""
    first = vit.blocks[0]
    return (
        isinstance(first.norm1, nn.LayerNorm)
        and isinstance(first.attn.k_norm, nn.Identity)
        and isinstance(vit.norm_pre, nn.Identity)
    )


def folded_direction(vit: VisionTransformer) -> Tensor:
    """v [D] of Eq. 4 at the first block, for `divide_tokens`: gamma * W_K^T q_0 / (heads * sqrt(H)).

    [CLS] is the same for every image here, so q_0 is one vector and the mean over heads moves inside. gamma is the
    LayerNorm's weight; its bias and the key's bias add the same to every patch, which the softmax does not see.
    """
    return inside(vit.blocks[0], _direction, prefix_tokens(vit)[None, :1])


def _direction(first: Block, cls_11D: Tensor) -> Tensor:
    attn = first.attn
    # Always float32: the fold multiplies three tensors, and the result is one vector.
    with torch.autocast(cls_11D.device.type, enabled=False):
        q_D = queries(attn, first.norm1(cls_11D.to(attn.qkv.weight.dtype))).flatten()
        width = len(q_D)
        direction_D = q_D @ attn.qkv.weight[width : 2 * width] * (attn.scale / attn.num_heads)
        return direction_D if first.norm1.weight is None else direction_D * first.norm1.weight


def _all_blocks(
    vit: VisionTransformer, x_BTD: Tensor, normalise: str, cls_only: bool, kernels: str, run: BlockRunner
) -> Tensor:
    """log s [B, L] from the softmaxed [CLS] rows of all blocks; nothing follows the last block's keys."""
    total_BL, read = None, RowReader(vit.num_prefix_tokens, kernels)
    *others, last = vit.blocks
    for block in others:
        x_BTD, total_BL = run.reading(block, x_BTD, total_BL, read)
    if cls_only:
        total_BL = read.add(last.attn, *inside(last, _cls_and_keys, x_BTD), total_BL)
    else:
        _, total_BL = run.reading(last, x_BTD, total_BL, read)
    # Up to a constant per row: renormalising subtracts log sum; the second softmax's logits are the sums themselves.
    return total_BL.log() if normalise == "renorm" else total_BL
