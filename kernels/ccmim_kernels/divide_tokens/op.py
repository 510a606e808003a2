"""Public function of the op: argument checks, then the implementation."""

# B batch, L patches, K visible, M masked, P prefix tokens, D width

from typing import NamedTuple

from torch import Tensor

from ccmim_kernels.divide_tokens import reference
from ccmim_kernels.partition import Partition
from ccmim_kernels.sample_partition.op import check_partition_arguments


class Divided(NamedTuple):
    """What `divide_tokens` gives.

    Attributes:
        visible: [B, P + K, D] prefix and visible tokens, in the dtype of the tokens.
        masked: [B, P + M, D] prefix and masked tokens without gradient, or None.
        partition: which patches are where.
        logits: [B, L] the logits of Eq. 4 up to a constant per row, or None (`random`, `block`).
    """

    visible: Tensor
    masked: Tensor | None
    partition: Partition
    logits: Tensor | None


def divide_tokens(
    tokens_BLD: Tensor,
    prefix_PD: Tensor,
    ids_B: Tensor,
    *,
    keep: int,
    grid: tuple[int, int],
    seed: int,
    epoch: int,
    logits_BL: Tensor | None = None,
    direction_D: Tensor | None = None,
    eps: float = 1e-6,
    strategy: str = "importance_sampling",
    noise: str = "gumbel",
    temperature: float = 1.0,
    block_min: int = 16,
    with_masked: bool = True,
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
        logits_BL: [B, L] float, no gradient; not together with `direction_D`.
        eps: of the LayerNorm.
        with_masked: gather the masked set too.

    Raises:
        ValueError: an argument out of its range, or both or neither of logits and direction for an importance strategy.
    """
    patches = tokens_BLD.shape[1]
    check_partition_arguments(strategy, noise, keep, patches, temperature)
    if grid[0] * grid[1] != patches:
        raise ValueError(f"grid={grid} has {grid[0] * grid[1]} patches, tokens have {patches}")
    given = (logits_BL is not None) + (direction_D is not None)
    if strategy.startswith("importance") and given != 1:
        raise ValueError(f"strategy={strategy} needs either logits or direction, got {given} of them")
    return Divided(
        *reference.divide_tokens(
            tokens_BLD,
            prefix_PD,
            ids_B,
            logits_BL=None if logits_BL is None else logits_BL.detach(),
            direction_D=None if direction_D is None else direction_D.detach(),
            eps=eps,
            with_masked=with_masked,
            keep=keep,
            grid=grid,
            seed=seed,
            epoch=epoch,
            strategy=strategy,
            noise=noise,
            temperature=temperature,
            block_min=block_min,
        )
    )
