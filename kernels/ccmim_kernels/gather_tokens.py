"""The op `gather_tokens` takes tokens by index and puts shared prefix tokens in front."""

# B batch, L patches, K kept, P prefix tokens, D width

import torch
from torch import Tensor

from ccmim_kernels.dispatch import choosable, operator, uses_triton


def gather_tokens_reference(tokens_BLD: Tensor, ids_BK: Tensor, prefix_PD: Tensor | None) -> Tensor:
    """Specify `gather_tokens` in plain PyTorch."""
    B, _, D = tokens_BLD.shape
    kept_BKD = tokens_BLD.gather(1, ids_BK[..., None].expand(-1, -1, D))
    if prefix_PD is None:
        return kept_BKD
    return torch.cat([prefix_PD.to(kept_BKD.dtype).expand(B, -1, -1), kept_BKD], dim=1)


@choosable("gather_tokens")
def gather_tokens(
    tokens_BLD: Tensor, ids_BK: Tensor, prefix_PD: Tensor | None = None, *, kernels: str = "auto"
) -> Tensor:
    """Gather tokens by index and put the shared prefix tokens ([CLS], registers) in front.

    Equivalent PyTorch: `cat([prefix.expand(B, P, D), tokens[b, ids[b]]], dim=1)`.

    Args:
        tokens_BLD: [B, L, D] float; receives a gradient (zero at tokens that were not taken).
        ids_BK: [B, K] int64, in 0 .. L - 1, distinct within a row. IndexError for others on a CPU; CUDA looks at none.
        prefix_PD: [P, D] float or None; receives a gradient (the sum over the batch).
        kernels: `auto`, `triton` or `reference`, see `ccmim_kernels.dispatch`.

    Returns:
        [B, P + K, D] in the dtype of `tokens_BLD`.
    """
    if tokens_BLD.ndim != 3 or ids_BK.ndim != 2 or len(tokens_BLD) != len(ids_BK):
        raise ValueError(f"tokens {list(tokens_BLD.shape)} and ids {list(ids_BK.shape)} must be [B, L, D] and [B, K]")
    if prefix_PD is not None and (prefix_PD.ndim != 2 or prefix_PD.shape[1] != tokens_BLD.shape[2]):
        raise ValueError(f"prefix {list(prefix_PD.shape)} must be [P, {tokens_BLD.shape[-1]}]")
    if uses_triton(kernels, "gather_tokens", tokens_BLD.device, tokens_BLD, prefix_PD):
        return _gather_tokens(tokens_BLD, ids_BK, prefix_PD)
    return gather_tokens_reference(tokens_BLD, ids_BK, prefix_PD)


def _save(ctx, inputs, output):
    tokens, ids, prefix = inputs
    ctx.save_for_backward(ids)
    ctx.patches = tokens.shape[1]
    ctx.prefix, ctx.dtype = (0, None) if prefix is None else (len(prefix), prefix.dtype)


def _backward(ctx, grad):
    tokens, prefix = gather_gradients(ctx, grad, ctx.needs_input_grad[::2])
    return tokens, None, prefix


@operator("gather_tokens", _save, _backward)
def _gather_tokens(tokens: Tensor, ids: Tensor, prefix: Tensor | None) -> Tensor:
    rows = ids.shape[1] + (0 if prefix is None else prefix.shape[0])
    return tokens.new_empty((tokens.shape[0], rows, tokens.shape[2]))


@operator("scatter_tokens")
def _scatter_tokens(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    """Return [B, rows, D]: row r is row P + j of `grad` [B, P + K, D] where ids[j] = r, else zeros."""
    return grad.new_empty((grad.shape[0], rows, grad.shape[2]))


def gather_gradients(ctx, grad_BTD: Tensor, needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the tokens and of the shared rows, as far as they are needed."""
    (ids_BK,) = ctx.saved_tensors
    tokens_BLD = _scatter_tokens(grad_BTD, ids_BK, ctx.patches) if needs[0] else None
    prefix_PD = grad_BTD[:, : ctx.prefix].sum(0, dtype=torch.float32).to(ctx.dtype) if needs[1] else None
    return tokens_BLD, prefix_PD
