"""The contrastive half: L_NCE (Eq. 7), L_align (Eq. 8), or the authors' code's form, with negatives from all ranks."""

# B local batch, N global batch, E embedding dim

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ccmim_kernels import info_nce, moco_nce


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks, in rank order; the gradient of a row is summed over the ranks that used it."""

    @staticmethod
    def forward(ctx, x_BE: Tensor) -> Tensor:
        parts = [torch.empty_like(x_BE) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x_BE.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad_NE: Tensor) -> Tensor:
        grad_NE = grad_NE.contiguous()
        dist.all_reduce(grad_NE)
        return grad_NE.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(x_BE: Tensor) -> tuple[Tensor, int]:
    """All ranks' rows [N, E], and the offset of this rank's own; every rank must hold equally many."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x_BE, 0
    return _GatherRows.apply(x_BE), dist.get_rank() * len(x_BE)


def align(masked_BE: Tensor, visible_BE: Tensor) -> Tensor:
    """L_align (Eq. 8): mean of 1 - cos(SG(hM_i), p(hV_i)), float32."""
    return (1 - F.cosine_similarity(masked_BE.detach().float(), visible_BE.float(), dim=-1)).mean()


def contrastive_loss(visible_BE: Tensor, masked_BE: Tensor, *, kind: str, tau: float, kernels: str = "auto") -> Tensor:
    """Scalar float32, the mean over the local images; the teacher hM receives no gradient.

    Args:
        visible_BE: [B, E] hV, for `align` p(hV).
        masked_BE: [B, E] hM.
        kind: `nce`, `align` or `moco`.
        tau: temperature; `align` has none.
        kernels: which implementation of the op runs, see `ccmim_kernels.dispatch`.
    """
    if kind == "align":
        return align(masked_BE, visible_BE)
    if kind == "moco":
        masked_NE, offset = gather_rows(masked_BE.detach())
        return moco_nce(visible_BE, masked_NE, offset=offset, tau=tau, kernels=kernels)
    visible_NE, offset = gather_rows(visible_BE)
    return info_nce(masked_BE, visible_BE, visible_NE, offset=offset, tau=tau, kernels=kernels)
