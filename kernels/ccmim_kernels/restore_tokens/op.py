"""Public function of the op: argument checks, then the implementation."""

# B batch, L patches, K visible, T = 1 + K, S = 1 + L, D width

from torch import Tensor

from ccmim_kernels.restore_tokens import reference


def restore_tokens(visible_BTD: Tensor, mask_token_D: Tensor, ids_restore_BL: Tensor, positions_SD: Tensor) -> Tensor:
    """Put visible tokens back on the grid, the mask token elsewhere, and add the decoder's positions.

    Equivalent PyTorch: `cat([visible[:, :1], cat([visible[:, 1:], mask_token], 1)[b, ids_restore[b]]], 1) + positions`.

    Args:
        visible_BTD: [B, 1 + K, D] float, [CLS] first; receives a gradient.
        mask_token_D: [D] float; receives a gradient (the sum over all masked positions).
        ids_restore_BL: [B, L] int64, of a `Partition` with K visible patches.
        positions_SD: [1 + L, D] float, fixed: no gradient.

    Returns:
        [B, 1 + L, D] in the dtype of `visible_BTD`.

    Raises:
        ValueError: shapes that do not fit.
    """
    B, L = ids_restore_BL.shape
    if len(visible_BTD) != B or visible_BTD.shape[1] > L:
        raise ValueError(f"visible {list(visible_BTD.shape)} must be [{B}, 1 + K, D] with K < {L}")
    if positions_SD.shape[0] != L + 1:
        raise ValueError(f"positions {list(positions_SD.shape)} must be [{L + 1}, D]")
    return reference.restore_tokens(visible_BTD, mask_token_D, ids_restore_BL, positions_SD)
