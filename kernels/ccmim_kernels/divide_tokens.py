"""The op `divide_tokens` scores the patches, divides them, and gathers both sets, in one pass over the tokens."""

# B batch, L patches, K visible, M masked, P prefix tokens, D width

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ccmim_kernels.calls import choosable
from ccmim_kernels.dispatch import operator, uses_triton, widened
from ccmim_kernels.gather_tokens import gather_gradients, gather_tokens
from ccmim_kernels.sample_partition import Partition, checked_samples, empty_partition, sample_partition


class Divided(NamedTuple):
    """This class is the result of `divide_tokens`."""

    visible: Tensor  # [B, P + K, D] prefix and visible tokens, in the dtype of the tokens
    masked: Tensor | None  # [B, P + M, D] prefix and masked tokens without gradient, or None
    partition: Partition  # which patches are where
    logits: Tensor | None  # [B, L] the logits of Eq. 4 up to a constant per row, or None (`random`, `block`)


def folded_logits(tokens_BLD: Tensor, direction_D: Tensor, eps: float) -> Tensor:
    """Return LN(x_i) . v [B, L], the LayerNorm without weight and bias: those are folded into v."""
    dtype = torch.promote_types(tokens_BLD.dtype, direction_D.dtype)
    # Scores stay float32 under autocast too.
    with torch.autocast(tokens_BLD.device.type, enabled=False):
        return F.layer_norm(tokens_BLD.to(dtype), tokens_BLD.shape[-1:], eps=eps) @ direction_D.to(dtype)


def divide_tokens_reference(
    tokens_BLD: Tensor,
    prefix_PD: Tensor,
    ids_B: Tensor,
    logits_BL: Tensor | None,
    direction_D: Tensor | None,
    *,
    eps: float,
    with_masked: bool,
    kernels: str = "reference",
    **sampling,
) -> Divided:
    """Specify `divide_tokens` by its three steps; `kernels` chooses the implementation of the second and the third."""
    if direction_D is not None:
        with torch.no_grad():
            logits_BL = folded_logits(tokens_BLD, direction_D, eps)
    partition = sample_partition(logits_BL, ids_B, kernels=kernels, **sampling)
    visible_BTD = gather_tokens(tokens_BLD, partition.ids_visible_BK, prefix_PD, kernels=kernels)
    masked_BTD = None
    if with_masked:
        masked_BTD = gather_tokens(tokens_BLD.detach(), partition.ids_masked_BM, prefix_PD.detach(), kernels=kernels)
    return Divided(visible_BTD, masked_BTD, partition, logits_BL)


@choosable("divide_tokens")
def divide_tokens(
    tokens_BLD: Tensor,
    prefix_PD: Tensor,
    ids_B: Tensor,
    *,
    keep: int,
    grid: tuple[int, int],
    seed: int,
    epoch: int | Tensor,
    logits_BL: Tensor | None = None,
    direction_D: Tensor | None = None,
    eps: float = 1e-6,
    strategy: str = "importance_sampling",
    noise: str = "gumbel",
    temperature: float = 1.0,
    block_min: int = 16,
    with_masked: bool = True,
    kernels: str = "auto",
) -> Divided:
    """Score the patches, divide them, and gather both sets with the prefix tokens in front (Eq. 4, section 3.2).

    Scores come from `direction_D` (Eq. 4 at the first block: logits_i = LN(x_i) . v, v = gamma * W_K^T q_0 / (heads *
    sqrt(head_dim)), LN without weight and bias; terms equal for all patches are left out, softmax does not see them) or
    from `logits_BL`. For sampling see `sample_partition`, whose arguments are passed on.

    Args:
        tokens_BLD: [B, L, D] float, embedded patches with positions; receives the gradient of the visible set only.
        prefix_PD: [P, D] float, [CLS] first; receives the gradient of the visible set only.
        ids_B: [B] int64 sample ids.
        direction_D: [D] float, no gradient.
        logits_BL: [B, L] float, no gradient; an importance strategy needs either this or `direction_D`.
        eps: of the LayerNorm.
        with_masked: gather the masked set too.
        kernels: `auto`, `triton` or `reference`, see `ccmim_kernels.dispatch`. Triton's is one launch; `block`
            takes one to sample and one for each set.
    """
    how = {"keep": keep, "seed": seed, "strategy": strategy, "noise": noise, "temperature": temperature}
    logits_BL, ids_B, epochs_B = checked_samples(logits_BL, ids_B, epoch, *tokens_BLD.shape[:2], **how)
    _check(tokens_BLD, prefix_PD, logits_BL, direction_D, grid, strategy)
    direction_D = None if direction_D is None else widened(direction_D.detach())
    inputs = (tokens_BLD, prefix_PD, ids_B, logits_BL, direction_D)
    how = {**how, "epoch": epochs_B, "eps": eps, "with_masked": with_masked}
    triton = uses_triton(kernels, "divide_tokens", tokens_BLD.device, tokens_BLD, prefix_PD, logits_BL, direction_D)
    if not triton or strategy == "block":
        parts = "triton" if triton else "reference"
        return divide_tokens_reference(*inputs, kernels=parts, grid=grid, block_min=block_min, **how)
    visible, masked, computed, *partition = _divide_tokens(*inputs, **how)
    logits_BL = logits_BL if direction_D is None else computed.detach()
    return Divided(visible, masked.detach() if with_masked else None, Partition(*partition), logits_BL)


def _check(tokens_BLD, prefix_PD, logits_BL, direction_D, grid, strategy) -> None:
    _, patches, D = tokens_BLD.shape
    if prefix_PD.ndim != 2 or prefix_PD.shape[1] != D:
        raise ValueError(f"prefix {list(prefix_PD.shape)} must be [P, {D}]")
    if direction_D is not None and tuple(direction_D.shape) != (D,):
        raise ValueError(f"direction is {list(direction_D.shape)}, expected [{D}]")
    if grid[0] * grid[1] != patches:
        raise ValueError(f"grid={grid} has {grid[0] * grid[1]} patches, tokens have {patches}")
    given = (logits_BL is not None) + (direction_D is not None)
    if strategy.startswith("importance") and given != 1:
        raise ValueError(f"strategy={strategy} needs either logits or direction, got {given} of them")


@operator("divide_tokens")
def _divide_tokens(
    tokens: Tensor,
    prefix: Tensor,
    ids: Tensor,
    logits: Tensor | None,
    direction: Tensor | None,
    eps: float,
    with_masked: bool,
    keep: int,
    seed: int,
    epoch: Tensor,
    strategy: str,
    noise: str,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, L, D = tokens.shape
    P = prefix.shape[0]
    return (
        tokens.new_empty((B, P + keep, D)),
        tokens.new_empty((B, P + L - keep, D) if with_masked else (0,)),
        tokens.new_empty((B, L) if direction is not None else (0,), dtype=torch.float32),
        *empty_partition(ids, L, keep, torch.bool),
    )


def _setup_context(ctx, inputs, output):
    tokens, prefix = inputs[:2]
    ctx.save_for_backward(output[3])
    ctx.patches, ctx.prefix, ctx.dtype = tokens.shape[1], len(prefix), prefix.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_others):
    """Take the gradient of the visible set alone: the masked set is the teacher's, logits have none."""
    if grad is None:
        return (None,) * 13
    (ids_visible,) = ctx.saved_tensors
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
    tokens, prefix = gather_gradients(grad, ids_visible, ctx.patches, ctx.prefix, ctx.dtype, needs)
    return tokens, prefix, *(None,) * 11


_divide_tokens.register_autograd(_backward, setup_context=_setup_context)
