"""Public functions of the op: argument checks, then the implementation."""

# B local batch, N global batch, E embedding dim

import torch
from torch import Tensor

from ccmim_kernels.info_nce import reference


def _check(rows_BE: Tensor, all_NE: Tensor, offset: int, tau: float) -> None:
    if rows_BE.shape[1] != all_NE.shape[1]:
        raise ValueError(f"embeddings {list(rows_BE.shape)} and {list(all_NE.shape)} differ in width")
    if not 0 <= offset <= len(all_NE) - len(rows_BE):
        raise ValueError(f"offset={offset} must be in 0..{len(all_NE) - len(rows_BE)}")
    if not tau > 0:
        raise ValueError(f"tau={tau} must be greater than 0")


def _wide(h: Tensor) -> Tensor:
    return h if h.dtype == torch.float64 else h.float()


def info_nce(
    masked_BE: Tensor, visible_BE: Tensor, visible_all_NE: Tensor | None = None, *, offset: int = 0, tau: float
) -> Tensor:
    """L_NCE (Eq. 7), the mean over the B local images.

    For image i, with cosine similarity s:
    -log( exp(s(hM_i, hV_i) / tau) / ( sum_{j != i} exp(s(hV_i, hV_j) / tau) + sum_j exp(s(hM_i, hV_j) / tau) ) ).

    Args:
        masked_BE: [B, E] float, hM of the local images: the teacher, no gradient.
        visible_BE: [B, E] float, hV of the local images; receives a gradient.
        visible_all_NE: [N, E] float, hV of all ranks; rows offset .. offset + B - 1 are the local ones; receives a
            gradient. None: N = B, a single rank.
        offset: see above.
        tau: temperature.

    Returns:
        A scalar; float32, or float64 from float64.

    Raises:
        ValueError: shapes or values that do not fit.
    """
    visible_all_NE = visible_BE if visible_all_NE is None else visible_all_NE
    _check(visible_BE, visible_all_NE, offset, tau)
    return reference.info_nce(_wide(masked_BE.detach()), _wide(visible_BE), _wide(visible_all_NE), offset, tau)


def moco_nce(visible_BE: Tensor, masked_all_NE: Tensor, *, offset: int = 0, tau: float) -> Tensor:
    """The authors' code's loss (MoCo v3): 2 tau times the cross-entropy of hV against all hM.

    Args:
        visible_BE: [B, E] float, hV of the local images; receives a gradient.
        masked_all_NE: [N, E] float, hM of all ranks, no gradient; rows offset .. offset + B - 1 are the local ones.
        offset, tau: as in `info_nce`.

    Returns:
        A scalar; float32, or float64 from float64.

    Raises:
        ValueError: shapes or values that do not fit.
    """
    _check(visible_BE, masked_all_NE, offset, tau)
    return reference.moco_nce(_wide(visible_BE), _wide(masked_all_NE.detach()), offset, tau)
