"""The contrastive half: L_NCE (Eq. 7), L_align (Eq. 8), or the authors' code's form, with negatives from all ranks."""

# B local batch, N global batch, E embedding dim

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ccmim_kernels import info_nce, moco_nce


def align(masked_BE: Tensor, visible_BE: Tensor) -> Tensor:
    """L_align (Eq. 8): mean of 1 - cos(SG(hM_i), p(hV_i)), float32."""
    return (1 - F.cosine_similarity(masked_BE.detach().float(), visible_BE.float(), dim=-1)).mean()


def contrastive_loss(
    visible_BE: Tensor,
    masked_BE: Tensor,
    rows_NE: Tensor | None = None,
    *,
    kind: str,
    tau: float,
    kernels: str = "auto",
) -> Tensor:
    """Scalar float32, the mean over the local images; the teacher hM receives no gradient.

    Args:
        visible_BE: [B, E] hV, for `align` p(hV).
        masked_BE: [B, E] hM.
        rows_NE: [N, E] of all ranks, in rank order: for `nce` hV, which receives a gradient, for `moco` hM; None: there
            is one rank. `align` compares with nobody.
        kind: `nce`, `align` or `moco`.
        tau: temperature; `align` has none.
        kernels: which implementation of the op runs, see `ccmim_kernels.dispatch`.
    """
    if kind == "align":
        return align(masked_BE, visible_BE)
    offset = 0 if rows_NE is None else dist.get_rank() * len(visible_BE)
    if kind == "moco":
        rows_NE = masked_BE if rows_NE is None else rows_NE
        return moco_nce(visible_BE, rows_NE, offset=offset, tau=tau, kernels=kernels)
    return info_nce(masked_BE, visible_BE, rows_NE, offset=offset, tau=tau, kernels=kernels)
