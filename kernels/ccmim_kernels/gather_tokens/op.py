"""Public function of the op: argument checks, then the implementation."""

# B batch, L patches, K kept, P prefix tokens, D width

from torch import Tensor

from ccmim_kernels.gather_tokens import reference


def gather_tokens(tokens_BLD: Tensor, ids_BK: Tensor, prefix_PD: Tensor | None = None) -> Tensor:
    """Gather tokens by index and put the shared prefix tokens ([CLS], registers) in front.

    Equivalent PyTorch: `cat([prefix.expand(B, P, D), tokens[b, ids[b]]], dim=1)`.

    Args:
        tokens_BLD: [B, L, D] float; receives a gradient (zero at tokens that were not taken).
        ids_BK: [B, K] int64, in 0 .. L - 1, distinct within a row.
        prefix_PD: [P, D] float or None; receives a gradient (the sum over the batch).

    Returns:
        [B, P + K, D] in the dtype of `tokens_BLD`.

    Raises:
        ValueError: shapes that do not fit.
    """
    if tokens_BLD.ndim != 3 or ids_BK.ndim != 2 or len(tokens_BLD) != len(ids_BK):
        raise ValueError(f"tokens {list(tokens_BLD.shape)} and ids {list(ids_BK.shape)} must be [B, L, D] and [B, K]")
    if prefix_PD is not None and prefix_PD.shape[-1] != tokens_BLD.shape[-1]:
        raise ValueError(f"prefix {list(prefix_PD.shape)} must be [P, {tokens_BLD.shape[-1]}]")
    return reference.gather_tokens(tokens_BLD, ids_BK, prefix_PD)
