"""MAE's decoder: visible tokens back on the grid, mask tokens elsewhere, a few blocks, one prediction per patch."""

# B batch, L patches, K visible, M masked, P values per patch, D decoder width, E encoder width

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ccmim_fast.models.blocks import block_for
from ccmim_fast.models.encoder import initialise
from ccmim_fast.models.positions import sincos_positions
from ccmim_kernels import Partition, gather_tokens, restore_tokens


class Decoder(nn.Module):
    """Predicts the target of the masked patches from the encoder's visible tokens.

    Args:
        encoder_dim: E.
        dim, depth, num_heads: of the decoder's blocks; `depth` at least 1.
        grid: rows and columns of patches.
        outputs: P, values predicted per patch.
        masked_only: compute the last block's queries and MLP and the prediction for masked positions only. The
            predictions are the same.
        kernels: which implementation of the ops runs, see `ccmim_kernels.dispatch`.
    """

    def __init__(
        self,
        *,
        encoder_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        grid: tuple[int, int],
        outputs: int,
        masked_only: bool = True,
        kernels: str = "auto",
    ):
        super().__init__()
        self.kernels = kernels
        self.masked_only = masked_only
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, grid, prefix=1)[None], requires_grad=False)
        norm = partial(nn.LayerNorm, eps=1e-6)  # MAE
        self.blocks = nn.ModuleList(Block(dim, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm = norm(dim)
        self.pred = nn.Linear(dim, outputs)
        initialise(self)

    def forward(self, visible_BTE: Tensor, partition: Partition) -> Tensor:
        """[B, 1 + K, E] encoder output ([CLS] first) -> [B, M, P], rows in the order of `partition.ids_masked_BM`."""
        x_BTD = restore_tokens(
            self.embed(visible_BTE),
            self.mask_token[0, 0],
            partition.ids_restore_BL,
            self.pos_embed[0],
            kernels=self.kernels,
        )
        *others, last = self.blocks
        for block in others:
            x_BTD = block(x_BTD)
        # Position 0 is [CLS], so patch i is token i + 1.
        ids_BM = partition.ids_masked_BM + 1
        if self.masked_only:
            x_BMD = block_for(last, gather_tokens(x_BTD, ids_BM, kernels=self.kernels), x_BTD)
        else:
            x_BMD = gather_tokens(last(x_BTD), ids_BM, kernels=self.kernels)
        return self.pred(self.norm(x_BMD))
