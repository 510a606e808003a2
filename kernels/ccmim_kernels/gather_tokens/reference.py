"""Gather in plain PyTorch: the specification of `gather_tokens`."""

# B batch, L patches, K kept, P prefix tokens, D width

import torch
from torch import Tensor


def gather_tokens(tokens_BLD: Tensor, ids_BK: Tensor, prefix_PD: Tensor | None) -> Tensor:
    """See `op.gather_tokens`."""
    B, _, D = tokens_BLD.shape
    kept_BKD = tokens_BLD.gather(1, ids_BK[..., None].expand(-1, -1, D))
    if prefix_PD is None:
        return kept_BKD
    return torch.cat([prefix_PD.to(kept_BKD.dtype).expand(B, -1, -1), kept_BKD], dim=1)
