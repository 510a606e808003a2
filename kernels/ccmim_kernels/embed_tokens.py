"""The op `embed_tokens` adds positions to projected patches, and scores the tokens where they are written."""

# B batch, L patches, D width

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ccmim_kernels.dispatch import choosable, operator, uses_triton, widened


class Embedded(NamedTuple):
    """This class is the result of `embed_tokens`."""

    tokens: Tensor  # [B, L, D] embedded patches
    logits: Tensor | None  # [B, L] of Eq. 4 at the first block, up to a constant per row; None: of tokens not scored


def folded_logits(tokens_BLD: Tensor, direction_D: Tensor, eps: float) -> Tensor:
    """Return LN(x_i) . v [B, L], the LayerNorm without weight and bias: those are folded into v."""
    dtype = torch.promote_types(tokens_BLD.dtype, direction_D.dtype)
    # Scores stay float32 under autocast too.
    with torch.autocast(tokens_BLD.device.type, enabled=False):
        return F.layer_norm(tokens_BLD.to(dtype), tokens_BLD.shape[-1:], eps=eps) @ direction_D.to(dtype)


def embed_tokens_reference(projected_BLD: Tensor, positions_LD: Tensor, direction_D: Tensor, eps: float) -> Embedded:
    """Specify `embed_tokens` in plain PyTorch."""
    tokens_BLD = projected_BLD + positions_LD
    with torch.no_grad():
        return Embedded(tokens_BLD, folded_logits(tokens_BLD, direction_D, eps))


@choosable("embed_tokens")
def embed_tokens(
    projected_BLD: Tensor, positions_LD: Tensor, direction_D: Tensor, *, eps: float = 1e-6, kernels: str = "auto"
) -> Embedded:
    """Add positions to projected patches, and score the tokens by Eq. 4 at the first block.

    There [CLS] is the same for every image, so that logits_i = LN(x_i) . v, with v = gamma * W_K^T q_0 / (heads *
    sqrt(head_dim)) and LN without weight and bias; terms equal for all patches are left out, softmax does not see them.

    Args:
        projected_BLD: [B, L, D] float, what the patch embedding's product gives; receives a gradient.
        positions_LD: [L, D] float; receives a gradient (the sum over the batch).
        direction_D: [D] float, v, without gradient.
        eps: of the LayerNorm.
        kernels: `auto`, `triton` or `reference`, see `ccmim_kernels.dispatch`.

    Returns:
        Tokens in the wider dtype of patches and positions; logits without gradient as float32 (float64 stays).
    """
    _, patches, D = projected_BLD.shape
    if tuple(positions_LD.shape) != (patches, D):
        raise ValueError(f"positions are {list(positions_LD.shape)}, expected [{patches}, {D}]")
    if tuple(direction_D.shape) != (D,):
        raise ValueError(f"direction is {list(direction_D.shape)}, expected [{D}]")
    direction_D = widened(direction_D.detach())
    if uses_triton(kernels, "embed_tokens", projected_BLD.device, projected_BLD, positions_LD, direction_D):
        tokens_BLD, logits_BL = _embed_tokens(projected_BLD, positions_LD, direction_D, eps)
        return Embedded(tokens_BLD, logits_BL.detach())
    return embed_tokens_reference(projected_BLD, positions_LD, direction_D, eps)


def _save(ctx, inputs, output):
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _logits):
    if grad is None:
        return None, None, None, None
    projected = grad.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
    positions = grad.sum(0, dtype=torch.float32).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
    return projected, positions, None, None


@operator("embed_tokens", _save, _backward)
def _embed_tokens(projected: Tensor, positions: Tensor, direction: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(projected.dtype, positions.dtype)
    tokens = projected.new_empty(projected.shape, dtype=dtype)
    return tokens, projected.new_empty(projected.shape[:2], dtype=torch.float32)
