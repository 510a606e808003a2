"""The op `cls_row` computes the row of an attention map that belongs to [CLS], averaged over heads."""

# B batch, T tokens, P prefix tokens, L patches (T = P + L), N heads, H head dim

import torch
from torch import Tensor

from ccmim_kernels.dispatch import choosable, operator, uses_triton

KINDS = ("logits", "softmax")


def cls_row_reference(q_BNH: Tensor, k_BTNH: Tensor, prefix: int, kind: str, scale: float) -> Tensor:
    """Specify `cls_row` in plain PyTorch."""
    logits_BNT = torch.einsum("bnh,btnh->bnt", q_BNH * scale, k_BTNH)
    if kind == "softmax":
        logits_BNT = logits_BNT.softmax(-1)
    return logits_BNT[:, :, prefix:].mean(1)


@choosable("cls_row")
@torch.no_grad()
def cls_row(
    q_BNH: Tensor,
    k_BTNH: Tensor,
    *,
    prefix: int,
    kind: str,
    scale: float,
    total_BL: Tensor | None = None,
    kernels: str = "auto",
) -> Tensor:
    """Compute the [CLS] row of an attention map, averaged over heads, patches only, without gradient.

    - `kind="logits"`: E_h[q_0 K_{1:}^T * scale], the argument of Eq. 4's softmax.
    - `kind="softmax"`: E_h[softmax(q_0 K^T * scale)]_{1:}, the softmax over all tokens, per head. A row sums to
      less than one: the rest is what [CLS] gives the prefix tokens.

    Args:
        q_BNH: [B, N, H] float, queries of [CLS].
        k_BTNH: [B, T, N, H] float, keys of all tokens, prefix first.
        prefix: number of prefix tokens, 1 .. T - 1.
        scale: usually H ** -0.5.
        total_BL: [B, T - prefix] as the result, to which the row is added: so rows of several blocks are summed.
        kernels: `auto`, `triton` or `reference`, see `ccmim_kernels.dispatch`.

    Returns:
        [B, T - prefix], a new tensor; float32, or float64 from float64.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    B, T, N, H = k_BTNH.shape
    if tuple(q_BNH.shape) != (B, N, H):
        raise ValueError(f"queries are {list(q_BNH.shape)}, keys want [{B}, {N}, {H}]")
    if not 1 <= prefix < T:
        raise ValueError(f"prefix={prefix} must be in 1..{T - 1}")
    if total_BL is not None and tuple(total_BL.shape) != (B, T - prefix):
        raise ValueError(f"total is {list(total_BL.shape)}, expected [{B}, {T - prefix}]")
    if uses_triton(kernels, "cls_row", k_BTNH.device, q_BNH, k_BTNH, total_BL):
        return _cls_row(q_BNH, k_BTNH, total_BL, prefix, kind, scale)
    if k_BTNH.dtype != torch.float64:
        q_BNH, k_BTNH = q_BNH.float(), k_BTNH.float()
    # Scores stay float32 under autocast too.
    with torch.autocast(k_BTNH.device.type, enabled=False):
        row_BL = cls_row_reference(q_BNH, k_BTNH, prefix, kind, scale)
    return row_BL if total_BL is None else total_BL + row_BL


@operator("cls_row")
def _cls_row(q: Tensor, k: Tensor, total: Tensor | None, prefix: int, kind: str, scale: float) -> Tensor:
    return k.new_empty((k.shape[0], k.shape[1] - prefix), dtype=torch.float32)
