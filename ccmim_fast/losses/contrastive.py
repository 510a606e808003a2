"""The contrastive half: L_NCE (Eq. 7), L_align (Eq. 8), or the authors' code's form, with negatives from all ranks.

Each class is a line of `registry.CONTRASTS`. It is built with settings of the section `contrast` as keyword arguments
and called with hV [B, E] (for Eq. 8 p(hV)), the teacher hM [B, E], which receives no gradient, and the rows of all
ranks [N, E] in rank order (None: there is one rank). It returns a scalar float32, the mean over the local images.
"""

# B local batch, N global batch, E embedding dim

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ccmim_kernels import info_nce, moco_nce


class InfoNCE(nn.Module):
    """L_NCE (Eq. 7); the rows of all ranks are hV, which receives a gradient.

    Args:
        temperature: tau.
        kernels: which implementation of the op runs, see `ccmim_kernels.dispatch`.
    """

    def __init__(self, *, temperature: float, kernels: str = "auto"):
        super().__init__()
        self.temperature, self.kernels = temperature, kernels

    def forward(self, visible_BE: Tensor, masked_BE: Tensor, gathered_NE: Tensor | None = None) -> Tensor:
        offset = _offset(visible_BE, gathered_NE)
        return info_nce(masked_BE, visible_BE, gathered_NE, offset=offset, tau=self.temperature, kernels=self.kernels)


class MoCo(InfoNCE):
    """The authors' code's form: cross-entropy of hV against the hM of all ranks, times 2 tau."""

    def forward(self, visible_BE: Tensor, masked_BE: Tensor, gathered_NE: Tensor | None = None) -> Tensor:
        offset = _offset(visible_BE, gathered_NE)
        rows_NE = masked_BE if gathered_NE is None else gathered_NE
        return moco_nce(visible_BE, rows_NE, offset=offset, tau=self.temperature, kernels=self.kernels)


class Align(nn.Module):
    """L_align (Eq. 8): the mean of 1 - cos(SG(hM_i), p(hV_i)); it compares with no other image."""

    def forward(self, visible_BE: Tensor, masked_BE: Tensor, gathered_NE: Tensor | None = None) -> Tensor:
        return (1 - F.cosine_similarity(masked_BE.detach().float(), visible_BE.float(), dim=-1)).mean()


def _offset(visible_BE: Tensor, gathered_NE: Tensor | None) -> int:
    """Return the row of all ranks' that the first local one is."""
    return 0 if gathered_NE is None else dist.get_rank() * len(visible_BE)
