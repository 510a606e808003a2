"""What goes into one forward pass beside the images, and what comes out of it."""

# B batch, N global batch, L patches, M masked, P values per patch, E embedding dim

from typing import NamedTuple

from torch import Tensor

from ccmim_kernels import Partition


class Output(NamedTuple):
    """What one forward pass gives.

    Attributes:
        pred_BMP: [B, M, P] predicted targets of the masked patches, rows in the order of `partition.ids_masked_BM`.
        partition: which patches are visible and masked.
        visible_BE: [B, E] hV (for `align`: p(hV)), or None without a contrastive loss.
        masked_BE: [B, E] hM, no gradient, or None likewise.
        logits_BL: [B, L] log-scores up to a constant per row, or None where nothing was scored.
        shares_BL: [B, L] log of how much more than its share of [CLS]'s attention each patch got in the pass it was in,
            float32 without gradient; None unless scores come from a bank of them.
        rows_NE: [N, E] what a contrastive loss compares with, of all ranks in rank order: hV for `nce`, hM for `moco`,
            else None; and None for one rank, and in eval mode, where each is alone.
    """

    pred_BMP: Tensor
    partition: Partition
    visible_BE: Tensor | None
    masked_BE: Tensor | None
    logits_BL: Tensor | None
    shares_BL: Tensor | None = None
    rows_NE: Tensor | None = None


class Known(NamedTuple):
    """What a bank knows of the patches before they are divided.

    Attributes:
        scores_BL: [B, L] as `Output.shares_BL`, 0 where nothing is known.
        share_BL: [B, L] how much of each score is known, 0 .. 1; for the rest 0 is assumed.
    """

    scores_BL: Tensor
    share_BL: Tensor
