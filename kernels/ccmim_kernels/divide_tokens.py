"""The op `divide_tokens` divides the patches by their scores, and gathers both sets in one pass over the tokens."""

# B batch, L patches, K visible, T masked ones that the teacher sees, P prefix tokens, D width

from typing import NamedTuple

from torch import Tensor

from ccmim_kernels.dispatch import choosable, operator, uses_triton
from ccmim_kernels.gather_tokens import gather_gradients, gather_tokens_reference
from ccmim_kernels.sample_partition import Partition, sample_partition


class Divided(NamedTuple):
    """This class is the result of `divide_tokens`."""

    visible: Tensor  # [B, P + K, D] prefix and visible tokens, in the dtype of the tokens
    masked: Tensor | None  # [B, P + T, D] prefix and the teacher's masked tokens without gradient, or None
    partition: Partition  # which patches are where
    logits: Tensor | None  # [B, L] the logits that were given, or None


def divide_tokens_reference(
    tokens_BLD: Tensor, prefix_PD: Tensor, partition: Partition, with_masked: bool
) -> tuple[Tensor, Tensor | None]:
    """Specify how `divide_tokens` gathers both sets; `sample_partition` specifies how it divides them."""
    visible_BTD = gather_tokens_reference(tokens_BLD, partition.ids_visible_BK, prefix_PD)
    if not with_masked:
        return visible_BTD, None
    return visible_BTD, gather_tokens_reference(tokens_BLD.detach(), partition.ids_teacher_BT, prefix_PD.detach())


@choosable("divide_tokens")
def divide_tokens(
    tokens_BLD: Tensor,
    prefix_PD: Tensor,
    ids_B: Tensor,
    *,
    grid: tuple[int, int],
    logits_BL: Tensor | None = None,
    with_masked: bool = True,
    kernels: str = "auto",
    **sampling,
) -> Divided:
    """Divide the patches and gather both sets with the prefix tokens in front (section 3.2).

    Of the masked set those tokens are gathered that the teacher sees: all, unless `teacher` says otherwise. Others are
    not read.

    Args:
        tokens_BLD: [B, L, D] float, embedded patches with positions; receives the gradient of the visible set only.
        prefix_PD: [P, D] float, [CLS] first; receives the gradient of the visible set only.
        ids_B: [B] int64 sample ids.
        grid: rows and columns of patches, rows * columns = L.
        logits_BL: [B, L] float, log-scores up to a constant per row, no gradient; for the importance strategies.
        with_masked: gather the masked set too.
        kernels: `auto`, `triton` or `reference`, see `ccmim_kernels.dispatch`.
        sampling: `keep`, `seed`, `epoch`, `teacher` and the other arguments of `sample_partition`.
    """
    _, patches, D = tokens_BLD.shape
    if prefix_PD.ndim != 2 or prefix_PD.shape[1] != D:
        raise ValueError(f"prefix {list(prefix_PD.shape)} must be [P, {D}]")
    if grid[0] * grid[1] != patches:
        raise ValueError(f"grid={grid} has {grid[0] * grid[1]} patches, tokens have {patches}")
    if len(ids_B) != len(tokens_BLD):
        raise ValueError(f"ids are {list(ids_B.shape)}, expected [{len(tokens_BLD)}]")
    partition = sample_partition(logits_BL, ids_B, grid=grid, kernels=kernels, **sampling)
    if uses_triton(kernels, "divide_tokens", tokens_BLD.device, tokens_BLD, prefix_PD):
        index = partition.ids_visible_BK, partition.ids_teacher_BT if with_masked else None
        visible, masked = _divide_tokens(tokens_BLD, prefix_PD, *index)
        masked = masked.detach() if with_masked else None
    else:
        visible, masked = divide_tokens_reference(tokens_BLD, prefix_PD, partition, with_masked)
    return Divided(visible, masked, partition, logits_BL)


def _save(ctx, inputs, output):
    tokens, prefix, ids_visible, _ = inputs
    ctx.save_for_backward(ids_visible)
    ctx.patches, ctx.prefix, ctx.dtype = tokens.shape[1], len(prefix), prefix.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _masked):
    """Take the gradient of the visible set alone: the masked set is the teacher's."""
    if grad is None:
        return (None,) * 4
    return *gather_gradients(ctx, grad, ctx.needs_input_grad[:2]), None, None


@operator("divide_tokens", _save, _backward)
def _divide_tokens(
    tokens: Tensor, prefix: Tensor, ids_visible: Tensor, ids_teacher: Tensor | None
) -> tuple[Tensor, Tensor]:
    (B, _, D), P = tokens.shape, prefix.shape[0]
    masked = (0,) if ids_teacher is None else (B, P + ids_teacher.shape[1], D)
    return tokens.new_empty((B, P + ids_visible.shape[1], D)), tokens.new_empty(masked)
