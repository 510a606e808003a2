"""Contrastive losses in plain PyTorch: the specification of `info_nce` and `moco_nce`."""

# B local batch, N global batch, E embedding dim

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(masked_BE: Tensor, visible_BE: Tensor, visible_all_NE: Tensor, offset: int, tau: float) -> Tensor:
    """See `op.info_nce`."""
    masked_BE, visible_BE, all_NE = (F.normalize(h, dim=-1) for h in (masked_BE, visible_BE, visible_all_NE))
    visible_BN = visible_BE @ all_NE.T / tau
    masked_BN = masked_BE @ all_NE.T / tau
    own_B1 = torch.arange(len(visible_BE), device=visible_BE.device)[:, None] + offset
    # The student's similarity to itself is no negative (j != i in Eq. 7).
    visible_BN = visible_BN.scatter(1, own_B1, float("-inf"))
    denominator_B = torch.cat([visible_BN, masked_BN], dim=1).logsumexp(1)
    return (denominator_B - masked_BN.gather(1, own_B1)[:, 0]).mean()


def moco_nce(visible_BE: Tensor, masked_all_NE: Tensor, offset: int, tau: float) -> Tensor:
    """See `op.moco_nce`."""
    logits_BN = F.normalize(visible_BE, dim=-1) @ F.normalize(masked_all_NE, dim=-1).T / tau
    own_B = torch.arange(len(visible_BE), device=visible_BE.device) + offset
    return 2 * tau * F.cross_entropy(logits_BN, own_B)
