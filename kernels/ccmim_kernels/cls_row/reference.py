"""Attention of [CLS] over the patches in plain PyTorch: the specification of `cls_row`."""

# B batch, T tokens, P prefix tokens, L patches (T = P + L), N heads, H head dim

import torch
from torch import Tensor


def cls_row(q_BNH: Tensor, k_BTNH: Tensor, prefix: int, kind: str, scale: float) -> Tensor:
    """See `op.cls_row`."""
    logits_BNT = torch.einsum("bnh,btnh->bnt", q_BNH * scale, k_BTNH)
    if kind == "softmax":
        logits_BNT = logits_BNT.softmax(-1)
    return logits_BNT[:, :, prefix:].mean(1)
