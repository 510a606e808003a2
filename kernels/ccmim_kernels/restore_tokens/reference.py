"""Un-shuffle in plain PyTorch: the specification of `restore_tokens`."""

# B batch, L patches, K visible, D width

import torch
from torch import Tensor


def restore_tokens(visible_BTD: Tensor, mask_token_D: Tensor, ids_restore_BL: Tensor, positions_SD: Tensor) -> Tensor:
    """See `op.restore_tokens`."""
    B, T, D = visible_BTD.shape
    L = ids_restore_BL.shape[1]
    filler_BMD = mask_token_D.to(visible_BTD.dtype).expand(B, L - (T - 1), D)
    both_BLD = torch.cat([visible_BTD[:, 1:], filler_BMD], dim=1)
    grid_BLD = both_BLD.gather(1, ids_restore_BL[..., None].expand(-1, -1, D))
    return torch.cat([visible_BTD[:, :1], grid_BLD], dim=1) + positions_SD.to(visible_BTD.dtype)
