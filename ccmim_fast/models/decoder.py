"""MAE's decoder: visible tokens back on the grid, mask tokens elsewhere, a few blocks, one prediction per patch."""

# B batch, L patches, K visible, M masked, P values per patch, D decoder width, E encoder width

from functools import partial

import torch
from torch import Tensor, nn

from ccmim_fast.models.block import ViTBlock
from ccmim_fast.models.encoder import initialise, sincos_positions
from ccmim_kernels import Partition, gather_tokens, restore_tokens


class Decoder(nn.Module):
    """The decoder predicts the target of the masked patches from the encoder's visible tokens.

    The last block's queries and MLP and the prediction are computed for masked positions only.

    Args:
        encoder_dim: E.
        dim, depth, num_heads: of the decoder's blocks; `depth` at least 1.
        grid: rows and columns of patches.
        outputs: P, values predicted per patch.
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
        kernels: str = "auto",
    ):
        super().__init__()
        self.kernels = kernels
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, grid, prefix=1)[None], requires_grad=False)
        norm = partial(nn.LayerNorm, eps=1e-6)  # MAE
        self.blocks = nn.ModuleList(ViTBlock(dim, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm = norm(dim)
        self.pred = nn.Linear(dim, outputs)
        initialise(self)

    def forward(self, visible_BTE: Tensor, partition: Partition) -> Tensor:
        """Map [B, 1 + K, E] encoder output ([CLS] first) to [B, M, P], rows as in `partition.ids_masked_BM`."""
        x_BTD = self.restore(self.embed(visible_BTE), partition.ids_restore_BL)
        *others, last = self.blocks
        for block in others:
            x_BTD = block(x_BTD)
        # Position 0 is [CLS], so patch i is token i + 1.
        masked_BMD = self.gather(x_BTD, partition.ids_masked_BM + 1)
        return self.pred(self.norm(last(x_BTD, query_BQD=masked_BMD)))

    def restore(self, visible_BTD: Tensor, ids_restore_BL: Tensor) -> Tensor:
        """Put visible tokens back on the grid, mask tokens elsewhere, and add positions: [B, 1 + L, D]."""
        return restore_tokens(
            visible_BTD, self.mask_token[0, 0], ids_restore_BL, self.pos_embed[0], kernels=self.kernels
        )

    def gather(self, x_BTD: Tensor, ids_BM: Tensor) -> Tensor:
        """Gather tokens [B, M, D]."""
        return gather_tokens(x_BTD, ids_BM, kernels=self.kernels)
