"""timm's standard block as functions, so that it can be computed for some of its tokens only, and with any attention.

The weights and their names stay timm's; what is here is the arithmetic of `timm.layers.Attention`.
"""

# B batch, T tokens, Q query tokens, N heads, H head dim, D width

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ccmim_fast.models.attention import attention
from ccmim_kernels import cls_row


def is_plain(block: nn.Module) -> bool:
    """Whether `block` is timm's standard pre-norm block, whose arithmetic this file knows."""
    # By what it does: FSDP gives a block whose weights it divides a class of its own.
    return type(block).forward is Block.forward and type(block.attn) is Attention


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


def inside(block: nn.Module, way: Callable, *args: Any) -> Any:
    """`way(block, *args)`, with the block's weights whole: who divides them among ranks hangs `around` on the block.

    What reads a block's weights without calling the block goes through here.
    """
    around = getattr(block, "around", None)
    return way(block, *args) if around is None else around(way, *args)


class RowReader(NamedTuple):
    """What is read of a block's attention: [CLS]'s softmaxed row over the patches, averaged over heads.

    Attributes:
        prefix: number of prefix tokens.
        kernels: which implementation of `cls_row` runs.
    """

    prefix: int
    kernels: str = "auto"

    def add(self, attn: Attention, q_BQNH: Tensor, k_BTNH: Tensor, total_BL: Tensor | None) -> Tensor:
        """`total_BL` (None: nothing yet) and this block's row, float32 without gradient."""
        kind, scale = "softmax", attn.scale
        q_BNH = q_BQNH[:, 0].detach()
        return cls_row(
            q_BNH, k_BTNH.detach(), prefix=self.prefix, kind=kind, scale=scale, total_BL=total_BL, kernels=self.kernels
        )


def block_and_row(
    block: Block, x_BTD: Tensor, total_BL: Tensor | None, read: RowReader, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`whole_block` of a plain block, and the sum of [CLS]'s rows so far."""
    normed_BTD = block.norm1(x_BTD)
    q_BTNH, k_BTNH, v_BTNH = queries_keys_values(block.attn, normed_BTD)
    total_BL = read.add(block.attn, q_BTNH, k_BTNH, total_BL)
    return finish(block, x_BTD, attend(block.attn, normed_BTD, q_BTNH, k_BTNH, v_BTNH, backend)), total_BL


def cls_and_row(
    block: Block, x_BTD: Tensor, total_BL: Tensor | None, read: RowReader, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`block_for` [CLS] alone, [B, 1, D], and the sum of its rows so far."""
    cls_B1D, normed_BTD = x_BTD[:, :1], block.norm1(x_BTD)
    normed_B1D = normed_BTD[:, :1]
    q_B1NH, (k_BTNH, v_BTNH) = queries(block.attn, normed_B1D), keys_values(block.attn, normed_BTD)
    total_BL = read.add(block.attn, q_B1NH, k_BTNH, total_BL)
    return finish(block, cls_B1D, attend(block.attn, normed_B1D, q_B1NH, k_BTNH, v_BTNH, backend)), total_BL


class BlockRunner:
    """How blocks are run: `run(block, x_BTD)` is the block's output, whatever these settings are.

    Args:
        attention: backend, see `models.attention`.
        recompute: keep a block's input alone for the backward pass, and compute the rest again (activation
            checkpointing).
    """

    def __init__(self, attention: str = "auto", recompute: bool = False):
        self.attention, self.recompute = attention, recompute
        self.uncompiled()

    def compile(self, **options: Any) -> None:
        """Compile the block as one graph, which all blocks of a width and a number of tokens share."""
        self._whole, self._part, self._read, self._read_cls = (
            torch.compile(way, fullgraph=True, **options) for way in _WAYS
        )

    def uncompiled(self) -> None:
        """Run eagerly again."""
        self._whole, self._part, self._read, self._read_cls = _WAYS

    @property
    def compiled(self) -> bool:
        return self._whole is not whole_block

    def __call__(self, block: nn.Module, x_BTD: Tensor) -> Tensor:
        """All tokens: [B, T, D] -> [B, T, D]."""
        return self._run(self._whole, block, x_BTD)

    def some(self, block: nn.Module, asking_BQD: Tensor, x_BTD: Tensor) -> Tensor:
        """The tokens `asking_BQD` (some of `x_BTD`) alone: [B, Q, D]. `block` must be plain."""
        return self._run(self._part, block, asking_BQD, x_BTD)

    def reading(
        self, block: nn.Module, x_BTD: Tensor, total_BL: Tensor | None, read: RowReader, cls_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """All tokens, or [CLS] alone, and `total_BL` with this block's row; see `RowReader`. `block` must be plain."""
        return self._run(self._read_cls if cls_only else self._read, block, x_BTD, total_BL, read)

    def _run(self, way: Callable, block: nn.Module, x_BTD: Tensor, *others: Any) -> Any:
        if self.recompute and x_BTD.requires_grad:
            return checkpoint(inside, block, way, x_BTD, *others, self.attention, use_reentrant=False)
        return inside(block, way, x_BTD, *others, self.attention)


_WAYS = (whole_block, block_for, block_and_row, cls_and_row)

PLAIN = BlockRunner()
