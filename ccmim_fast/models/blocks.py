"""timm's standard block as functions, so that it can be computed for some of its tokens only, and with any attention.

The weights and their names stay timm's; what is here is the arithmetic of `timm.layers.Attention`.
"""

# B batch, T tokens, Q query tokens, N heads, H head dim, D width

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ccmim_fast.models.attention import attention


def is_plain(block: nn.Module) -> bool:
    """Whether `block` is timm's standard pre-norm block, whose arithmetic this file knows."""
    return type(block) is Block and type(block.attn) is Attention


def _project(attn: Attention, x_BTD: Tensor, parts: slice) -> Tensor:
    """Some of the fused query, key, value projection: [B, T, parts, N, H]."""
    width = attn.num_heads * attn.head_dim
    weight, bias = attn.qkv.weight, attn.qkv.bias
    if parts != slice(0, 3):
        rows = slice(parts.start * width, parts.stop * width)
        weight, bias = weight[rows], None if bias is None else bias[rows]
    return F.linear(x_BTD, weight, bias).unflatten(-1, (parts.stop - parts.start, attn.num_heads, attn.head_dim))


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


def queries_keys_values(attn: Attention, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each [B, T, N, H], by one product."""
    q_BTNH, k_BTNH, v_BTNH = _project(attn, x_BTD, slice(0, 3)).unbind(2)
    return attn.q_norm(q_BTNH), attn.k_norm(k_BTNH), v_BTNH


def attend(
    attn: Attention, x_BQD: Tensor, q_BQNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, backend: str = "auto"
) -> Tensor:
    """Attention and output projection [B, Q, D]; `x_BQD` are the normalised query tokens, which the gate reads."""
    dropout = attn.attn_drop.p if attn.training else 0.0
    mixed = attn.norm(attention(q_BQNH, k_BTNH, v_BTNH, backend, dropout).flatten(2))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        mixed = mixed * gate(x_BQD).sigmoid()
    return attn.proj_drop(attn.proj(mixed))


def finish(block: Block, x_BQD: Tensor, attended_BQD: Tensor) -> Tensor:
    """Both residuals of the block, given the attention's output."""
    x_BQD = x_BQD + block.drop_path1(block.ls1(attended_BQD))
    return x_BQD + block.drop_path2(block.ls2(block.mlp(block.norm2(x_BQD))))


def whole_block(block: nn.Module, x_BTD: Tensor, backend: str = "auto") -> Tensor:
    """The block's output for all its tokens, [B, T, D]; a block that is not plain has its own attention."""
    if not is_plain(block):
        return block(x_BTD)
    normed_BTD = block.norm1(x_BTD)
    return finish(block, x_BTD, attend(block.attn, normed_BTD, *queries_keys_values(block.attn, normed_BTD), backend))


def block_for(block: nn.Module, asking_BQD: Tensor, x_BTD: Tensor, backend: str = "auto") -> Tensor:
    """The block's output for the tokens `asking_BQD` (some of `x_BTD`) alone: [B, Q, D].

    Equal to running the whole block and taking those tokens. `block` must be plain.
    """
    normed_BTD, normed_BQD = block.norm1(x_BTD), block.norm1(asking_BQD)
    k_BTNH, v_BTNH = keys_values(block.attn, normed_BTD)
    attended = attend(block.attn, normed_BQD, queries(block.attn, normed_BQD), k_BTNH, v_BTNH, backend)
    return finish(block, asking_BQD, attended)


class BlockRunner:
    """How blocks are run: `run(block, x_BTD)` is the block's output, whatever these settings are.

    Args:
        attention: backend, see `models.attention`.
        recompute: keep a block's input alone for the backward pass, and compute the rest again (activation
            checkpointing).
    """

    def __init__(self, attention: str = "auto", recompute: bool = False):
        self.attention, self.recompute = attention, recompute
        self._whole, self._part = whole_block, block_for

    def compile(self, **options: Any) -> None:
        """Compile the block as one graph, which all blocks of a width and a number of tokens share."""
        self._whole = torch.compile(whole_block, fullgraph=True, **options)
        self._part = torch.compile(block_for, fullgraph=True, **options)

    def uncompiled(self) -> None:
        """Run eagerly again."""
        self._whole, self._part = whole_block, block_for

    @property
    def compiled(self) -> bool:
        return self._whole is not whole_block

    def __call__(self, block: nn.Module, x_BTD: Tensor) -> Tensor:
        """All tokens: [B, T, D] -> [B, T, D]."""
        if self.recompute and x_BTD.requires_grad:
            return checkpoint(self._whole, block, x_BTD, self.attention, use_reentrant=False)
        return self._whole(block, x_BTD, self.attention)

    def some(self, block: nn.Module, asking_BQD: Tensor, x_BTD: Tensor) -> Tensor:
        """The tokens `asking_BQD` (some of `x_BTD`) alone: [B, Q, D]. `block` must be plain."""
        if self.recompute and x_BTD.requires_grad:
            return checkpoint(self._part, block, asking_BQD, x_BTD, self.attention, use_reentrant=False)
        return self._part(block, asking_BQD, x_BTD, self.attention)


PLAIN = BlockRunner()
