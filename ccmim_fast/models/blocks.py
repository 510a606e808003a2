"""A timm block, computed for some of its tokens only: all tokens give keys and values, few ask.

The weights and their names stay timm's; what is here is the arithmetic of `timm.layers.Attention`.
"""

# B batch, T tokens, Q query tokens, N heads, H head dim, D width

import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn


def is_plain(block: nn.Module) -> bool:
    """Whether `block` is timm's standard pre-norm block, whose arithmetic this file knows."""
    return type(block) is Block and type(block.attn) is Attention


def _project(attn: Attention, x_BTD: Tensor, parts: slice) -> Tensor:
    """Some of the fused query, key, value projection: [B, T, parts, N, H]."""
    width = attn.num_heads * attn.head_dim
    rows = slice(parts.start * width, parts.stop * width)
    bias = None if attn.qkv.bias is None else attn.qkv.bias[rows]
    projected = F.linear(x_BTD, attn.qkv.weight[rows], bias)
    return projected.unflatten(-1, (parts.stop - parts.start, attn.num_heads, attn.head_dim))


def queries(attn: Attention, x_BQD: Tensor) -> Tensor:
    """Queries [B, Q, N, H] of normalised tokens, after the query norm."""
    return attn.q_norm(_project(attn, x_BQD, slice(0, 1))[:, :, 0])


def keys(attn: Attention, x_BTD: Tensor) -> Tensor:
    """Keys [B, T, N, H] of normalised tokens, after the key norm."""
    return attn.k_norm(_project(attn, x_BTD, slice(1, 2))[:, :, 0])


def keys_values(attn: Attention, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, each [B, T, N, H]."""
    k_BTNH, v_BTNH = _project(attn, x_BTD, slice(1, 3)).unbind(2)
    return attn.k_norm(k_BTNH), v_BTNH


def attend(attn: Attention, x_BQD: Tensor, q_BQNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor) -> Tensor:
    """Attention and output projection [B, Q, D]; `x_BQD` are the normalised query tokens, which the gate reads."""
    dropout = attn.attn_drop.p if attn.training else 0.0
    mixed = F.scaled_dot_product_attention(
        q_BQNH.transpose(1, 2), k_BTNH.transpose(1, 2), v_BTNH.transpose(1, 2), dropout_p=dropout
    )
    mixed = attn.norm(mixed.transpose(1, 2).flatten(2))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        mixed = mixed * gate(x_BQD).sigmoid()
    return attn.proj_drop(attn.proj(mixed))


def finish(block: Block, x_BQD: Tensor, attended_BQD: Tensor) -> Tensor:
    """Both residuals of the block, given the attention's output."""
    x_BQD = x_BQD + block.drop_path1(block.ls1(attended_BQD))
    return x_BQD + block.drop_path2(block.ls2(block.mlp(block.norm2(x_BQD))))


def block_for(block: nn.Module, asking_BQD: Tensor, x_BTD: Tensor) -> Tensor:
    """The block's output for the tokens `asking_BQD` (some of `x_BTD`) alone: [B, Q, D].

    Equal to running the whole block and taking those tokens. `block` must be plain.
    """
    normed_BTD, normed_BQD = block.norm1(x_BTD), block.norm1(asking_BQD)
    k_BTNH, v_BTNH = keys_values(block.attn, normed_BTD)
    attended = attend(block.attn, normed_BQD, queries(block.attn, normed_BQD), k_BTNH, v_BTNH)
    return finish(block, asking_BQD, attended)
