"""Score, sample, gather in plain PyTorch: the specification of `divide_tokens`."""

# B batch, L patches, P prefix tokens, D width

import torch
import torch.nn.functional as F
from torch import Tensor

from ccmim_kernels.gather_tokens.reference import gather_tokens
from ccmim_kernels.partition import Partition
from ccmim_kernels.sample_partition.reference import sample_partition


def folded_logits(tokens_BLD: Tensor, direction_D: Tensor, eps: float) -> Tensor:
    """LN(x_i) . v for every token, the LayerNorm without weight and bias: those are folded into v."""
    dtype = torch.promote_types(tokens_BLD.dtype, direction_D.dtype)
    # Scores stay float32 under autocast too.
    with torch.autocast(tokens_BLD.device.type, enabled=False):
        return F.layer_norm(tokens_BLD.to(dtype), tokens_BLD.shape[-1:], eps=eps) @ direction_D.to(dtype)


def divide_tokens(
    tokens_BLD: Tensor,
    prefix_PD: Tensor,
    ids_B: Tensor,
    *,
    logits_BL: Tensor | None,
    direction_D: Tensor | None,
    eps: float,
    with_masked: bool,
    **sampling,
) -> tuple[Tensor, Tensor | None, Partition, Tensor | None]:
    """See `op.divide_tokens`."""
    if direction_D is not None:
        with torch.no_grad():
            logits_BL = folded_logits(tokens_BLD, direction_D, eps)
    partition = sample_partition(logits_BL, ids_B, patches=tokens_BLD.shape[1], **sampling)
    visible_BTD = gather_tokens(tokens_BLD, partition.ids_visible_BK, prefix_PD)
    masked_BTD = None
    if with_masked:
        masked_BTD = gather_tokens(tokens_BLD.detach(), partition.ids_masked_BM, prefix_PD.detach())
    return visible_BTD, masked_BTD, partition, logits_BL
