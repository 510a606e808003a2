"""How much [CLS] attends to each patch (Eq. 4), read at the first block, at one block, or at all of them."""

# B batch, L patches, P prefix tokens, T = P + L tokens, N heads, H head dim, D width

from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ccmim_fast.errors import ConfigError
from ccmim_fast.models.blocks import attend, finish, is_plain, keys, keys_values, queries
from ccmim_fast.models.encoder import prefix_tokens
from ccmim_kernels import cls_row


class Score(NamedTuple):
    """Eq. 4 before its softmax: either logits [B, L], or the direction v [D] with logits_i = LN(x_i) . v."""

    logits_BL: Tensor | None
    direction_D: Tensor | None


def check_scores(vit: VisionTransformer, source: str, block: int) -> None:
    """Raise ConfigError where this encoder's attention cannot be read as `source` asks."""
    if not all(is_plain(b) for b in vit.blocks):
        kind = type(vit.blocks[0]).__name__
        raise ConfigError(f"score.source={source}: the encoder's {kind} has no attention map; use mask.strategy=random")
    if source == "block" and not 0 <= block < len(vit.blocks):
        raise ConfigError(f"score.block={block} must be in 0..{len(vit.blocks) - 1}")


@torch.no_grad()
def score(
    vit: VisionTransformer, x_BLD: Tensor, source: str, block: int, normalise: str, kernels: str = "auto"
) -> Score:
    """Scores of embedded patches `x_BLD` (with positions, before the blocks); no gradient.

    Args:
        source: `first` (Eq. 4 at block 0), `block` (Eq. 4 at block `block`), `all` (mean over blocks of the softmaxed
            [CLS] row).
        normalise: for `all`, `renorm` (renormalised over patches) or `softmax` (sum over blocks, softmax again).
        kernels: which implementation of the ops runs, see `ccmim_kernels.dispatch`.
    """
    if source == "first" and can_fold(vit):
        return Score(None, folded_direction(vit))
    prefix_BPD = prefix_tokens(vit).to(x_BLD.dtype).expand(len(x_BLD), -1, -1)
    x_BTD = vit.norm_pre(torch.cat([prefix_BPD, x_BLD], dim=1))
    if source == "all":
        return Score(_all_blocks(vit, x_BTD, normalise, kernels), None)
    index = 0 if source == "first" else block
    for earlier in vit.blocks[:index]:
        x_BTD = earlier(x_BTD)
    return Score(eq4_logits(vit, index, x_BTD, kernels), None)


def eq4_logits(vit: VisionTransformer, block: int, x_BTD: Tensor, kernels: str = "auto") -> Tensor:
    """E_h[q_0 K_{1:}^T / sqrt(H)] [B, L] at one block, from the tokens that enter it (Eq. 4)."""
    attn, normed_BTD = vit.blocks[block].attn, vit.blocks[block].norm1(x_BTD)
    q_BNH = queries(attn, normed_BTD[:, :1])[:, 0]
    k_BTNH = keys(attn, normed_BTD)
    return cls_row(q_BNH, k_BTNH, prefix=vit.num_prefix_tokens, kind="logits", scale=attn.scale, kernels=kernels)


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
    first = vit.blocks[0]
    attn = first.attn
    # Always float32: the fold multiplies three tensors, and the result is one vector.
    with torch.autocast(vit.cls_token.device.type, enabled=False):
        q_D = queries(attn, first.norm1(prefix_tokens(vit)[None, :1].to(attn.qkv.weight.dtype))).flatten()
        width = len(q_D)
        direction_D = q_D @ attn.qkv.weight[width : 2 * width] * (attn.scale / attn.num_heads)
        return direction_D if first.norm1.weight is None else direction_D * first.norm1.weight


def _all_blocks(vit: VisionTransformer, x_BTD: Tensor, normalise: str, kernels: str) -> Tensor:
    """log s [B, L] from the softmaxed [CLS] rows of all blocks; the last block computes its [CLS] row only."""
    total_BL = None
    last = len(vit.blocks) - 1
    for index, block in enumerate(vit.blocks):
        normed_BTD = block.norm1(x_BTD)
        if index == last:
            k_BTNH = keys(block.attn, normed_BTD)
            q_BTNH = queries(block.attn, normed_BTD[:, :1])
        else:
            k_BTNH, v_BTNH = keys_values(block.attn, normed_BTD)
            q_BTNH = queries(block.attn, normed_BTD)
            x_BTD = finish(block, x_BTD, attend(block.attn, normed_BTD, q_BTNH, k_BTNH, v_BTNH))
        total_BL = cls_row(
            q_BTNH[:, 0],
            k_BTNH,
            prefix=vit.num_prefix_tokens,
            kind="softmax",
            scale=block.attn.scale,
            total_BL=total_BL,
            kernels=kernels,
        )
    # Up to a constant per row: renormalising subtracts log sum; the second softmax's logits are the sums themselves.
    return total_BL.log() if normalise == "renorm" else total_BL
