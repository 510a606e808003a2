"""Rows moved the usual way, by index tensors as large as the tokens: what `fast.row_ops` saves, kept to measure it."""

# B batch, L patches, K kept, M masked, P prefix tokens, T = 1 + K, D width, S = 1 + L

import torch
from torch import Tensor

from ccmim_kernels import Divided, Partition


def gather(x_BLD: Tensor, ids_BK: Tensor) -> Tensor:
    """[B, K, D] rows of `x_BLD`."""
    return torch.gather(x_BLD, 1, ids_BK[..., None].repeat(1, 1, x_BLD.shape[2]))


def divide_tokens(
    x_BLD: Tensor, prefix_PD: Tensor, partition: Partition, logits_BL: Tensor | None, with_masked: bool
) -> Divided:
    """Both sets with the prefix in front, as `ccmim_kernels.divide_tokens` gives them."""
    visible_BTD = _with_prefix(gather(x_BLD, partition.ids_visible_BK), prefix_PD)
    if not with_masked:
        return Divided(visible_BTD, None, partition, logits_BL)
    masked_BTD = _with_prefix(gather(x_BLD.detach(), partition.ids_masked_BM), prefix_PD.detach())
    return Divided(visible_BTD, masked_BTD, partition, logits_BL)


def restore_tokens(visible_BTD: Tensor, mask_token_D: Tensor, ids_restore_BL: Tensor, positions_SD: Tensor) -> Tensor:
    """As `ccmim_kernels.restore_tokens`: visible tokens back on the grid, mask tokens elsewhere, plus positions."""
    batch, patches = ids_restore_BL.shape
    filler_BMD = mask_token_D.to(visible_BTD.dtype).repeat(batch, patches + 1 - visible_BTD.shape[1], 1)
    grid_BLD = gather(torch.cat([visible_BTD[:, 1:], filler_BMD], dim=1), ids_restore_BL)
    return torch.cat([visible_BTD[:, :1], grid_BLD], dim=1) + positions_SD


def _with_prefix(x_BKD: Tensor, prefix_PD: Tensor) -> Tensor:
    return torch.cat([prefix_PD.to(x_BKD.dtype).expand(len(x_BKD), -1, -1), x_BKD], dim=1)
