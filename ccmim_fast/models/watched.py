"""This file reads [CLS]'s attention in blocks of any class: ours tell it, others are watched.

timm's other blocks (parallel, post-norm, differential, ...) compute their attention by
`F.scaled_dot_product_attention`, whose queries and keys tell the map.
"""

# B batch, L patches, T tokens, D width, N heads, H head dim

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ccmim_fast.errors import ConfigError
from ccmim_fast.models.block import ViTBlock
from ccmim_kernels import cls_row


def cls_attention(
    block: nn.Module, x_BTD: Tensor, prefix: int, kind: str, total_BL: Tensor | None = None, **rotation: Tensor
) -> Tensor:
    """Return [CLS]'s attention [B, L] as `ViTBlock.cls_attention` does, of a block of any class.

    `rotation` is the block's, from `tokens.rotary_tables`.
    """
    if isinstance(block, ViTBlock):
        return block.cls_attention(x_BTD, kind, total_BL, **rotation)
    return watched(block, x_BTD, prefix, kind, total_BL, **rotation)[1]


@torch.compiler.disable
def watched(
    block: nn.Module, x_BTD: Tensor, prefix: int, kind: str, total_BL: Tensor | None = None, **rotation: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a block's output [B, T, D], and [CLS]'s attention to the patches [B, L] added to `total_BL`.

    The attention is as of `ViTBlock.cls_attention`: float32 without gradient, averaged over heads. `prefix` is the
    number of tokens before the patches, `rotation` the block's from `tokens.rotary_tables`. Raises ConfigError where
    the block has no attention that can be watched.
    """
    with _Watch(prefix, kind) as watch:
        x_BTD = block(x_BTD, **rotation)
    if not watch.rows:
        name = type(block).__name__
        raise ConfigError(f"score.source: the encoder's {name} has no attention map; use mask.strategy=random")
    # A block may have several attentions side by side: their mean.
    row_BL = torch.stack(watch.rows).mean(0)
    return x_BTD, row_BL if total_BL is None else total_BL + row_BL


class _Watch(TorchFunctionMode):
    """This mode keeps the row of [CLS] of each attention that is computed inside."""

    def __init__(self, prefix: int, kind: str):
        super().__init__()
        self._prefix, self._kind, self.rows = prefix, kind, []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q_BNTH, k_BNTH = (x.detach() for x in args[:2])
            scale = kwargs.get("scale") or q_BNTH.shape[-1] ** -0.5
            self.rows.append(
                cls_row(q_BNTH[:, :, 0], k_BNTH.transpose(1, 2), prefix=self._prefix, kind=self._kind, scale=scale)
            )
        return function(*args, **kwargs)
