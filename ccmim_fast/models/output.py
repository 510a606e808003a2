"""The result of one forward pass."""

# B batch, N global batch, L patches, M masked, P values per patch, E embedding dim

from typing import NamedTuple

from torch import Tensor

from ccmim_kernels import Partition


class Output(NamedTuple):
    """The tensors that one forward pass gives.

    Attributes:
        pred_BMP: [B, M, P] predicted targets of the masked patches, rows in the order of `partition.ids_masked_BM`.
        partition: which patches are visible and masked.
        visible_BE: [B, E] hV (for `align`: p(hV)), or None without a contrastive loss.
        masked_BE: [B, E] hM, no gradient, or None likewise.
        logits_BL: [B, L] log-scores up to a constant per row, or None where nothing was scored.
        cls_attention_BL: [B, L] log of [CLS]'s attention to each patch in the pass it was in, over an equal
            share of it; float32 without gradient; None unless scores come from a bank of them.
        gathered_NE: [N, E] the rows of all ranks, in rank order, that a contrastive loss compares with: hV for `nce`,
            hM for `moco`, else None; and None for one rank, and in eval mode, where each is alone.
    """

    pred_BMP: Tensor
    partition: Partition
    visible_BE: Tensor | None
    masked_BE: Tensor | None
    logits_BL: Tensor | None
    cls_attention_BL: Tensor | None = None
    gathered_NE: Tensor | None = None
