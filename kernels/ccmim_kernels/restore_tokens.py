"""The op `restore_tokens` puts visible tokens back on the grid, the mask token elsewhere, and adds positions."""

# B batch, L patches, K visible, M masked, T = 1 + K, S = 1 + L, D width

import torch
from torch import Tensor

from ccmim_kernels.dispatch import choosable, operator, uses_triton


def restore_tokens_reference(
    visible_BTD: Tensor, mask_token_D: Tensor, ids_restore_BL: Tensor, positions_SD: Tensor
) -> Tensor:
    """Specify `restore_tokens` in plain PyTorch."""
    B, T, D = visible_BTD.shape
    L = ids_restore_BL.shape[1]
    filler_BMD = mask_token_D.to(visible_BTD.dtype).expand(B, L - (T - 1), D)
    both_BLD = torch.cat([visible_BTD[:, 1:], filler_BMD], dim=1)
    grid_BLD = both_BLD.gather(1, ids_restore_BL[..., None].expand(-1, -1, D))
    return torch.cat([visible_BTD[:, :1], grid_BLD], dim=1) + positions_SD.to(visible_BTD.dtype)


@choosable("restore_tokens")
def restore_tokens(
    visible_BTD: Tensor, mask_token_D: Tensor, ids_restore_BL: Tensor, positions_SD: Tensor, *, kernels: str = "auto"
) -> Tensor:
    """Put visible tokens back on the grid, the mask token elsewhere, and add the decoder's positions.

    Equivalent PyTorch: `cat([visible[:, :1], cat([visible[:, 1:], mask_token], 1)[b, ids_restore[b]]], 1) + positions`.

    Args:
        visible_BTD: [B, 1 + K, D] float, [CLS] first; receives a gradient.
        mask_token_D: [D] float; receives a gradient (the sum over all masked positions).
        ids_restore_BL: [B, L] int64, of a `Partition` with K visible patches, so 0 .. L - 1. IndexError for others on a
            CPU; CUDA looks at none.
        positions_SD: [1 + L, D] float, fixed: no gradient.
        kernels: `auto`, `triton` or `reference`, see `ccmim_kernels.dispatch`.

    Returns:
        [B, 1 + L, D] in the dtype of `visible_BTD`.
    """
    B, L = ids_restore_BL.shape
    if len(visible_BTD) != B or visible_BTD.shape[1] > L:
        raise ValueError(f"visible {list(visible_BTD.shape)} must be [{B}, 1 + K, D] with K < {L}")
    D = visible_BTD.shape[2]
    if tuple(positions_SD.shape) != (L + 1, D):
        raise ValueError(f"positions {list(positions_SD.shape)} must be [{L + 1}, {D}]")
    if tuple(mask_token_D.shape) != (D,):
        raise ValueError(f"mask token {list(mask_token_D.shape)} must be [{D}]")
    positions_SD = positions_SD.detach()
    if uses_triton(kernels, "restore_tokens", visible_BTD.device, visible_BTD, mask_token_D, positions_SD):
        return _restore_tokens(visible_BTD, mask_token_D, ids_restore_BL, positions_SD)
    return restore_tokens_reference(visible_BTD, mask_token_D, ids_restore_BL, positions_SD)


def _save(ctx, inputs, output):
    visible, mask_token, ids_restore, _ = inputs
    ctx.save_for_backward(ids_restore)
    ctx.keep, ctx.dtype = visible.shape[1] - 1, mask_token.dtype


def _backward(ctx, grad):
    (ids_restore,) = ctx.saved_tensors
    visible, mask_token = _restore_tokens_gradients(grad, ids_restore, ctx.keep)
    return visible, mask_token.to(ctx.dtype), None, None


@operator("restore_tokens", _save, _backward)
def _restore_tokens(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, positions: Tensor) -> Tensor:
    return visible.new_empty((visible.shape[0], ids_restore.shape[1] + 1, visible.shape[2]))


@operator("restore_tokens_gradients")
def _restore_tokens_gradients(grad: Tensor, ids_restore: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    B, _, D = grad.shape
    return grad.new_empty((B, keep + 1, D)), grad.new_empty((D,), dtype=torch.float32)
