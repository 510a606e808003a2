"""MAE's decoder: visible tokens back on the grid, mask tokens elsewhere, a few blocks, one prediction per patch."""

# B batch, L patches, K visible, M masked, P values per patch, D decoder width, E encoder width

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ccmim_fast.models import repeated
from ccmim_fast.models.blocks import BlockRunner
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
        masked_only: compute the last block's queries and MLP and the prediction for masked positions only.
        row_ops: restore and gather by the ops of `ccmim_kernels`; False: by index tensors as large as the tokens.
        kernels: which implementation of the ops runs, see `ccmim_kernels.dispatch`.
        run: how the blocks are run.

    `masked_only`, `row_ops`, `kernels` and `run` change no prediction.
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
        row_ops: bool = True,
        kernels: str = "auto",
        run: BlockRunner | None = None,
    ):
        super().__init__()
        self.kernels = kernels
        self.masked_only, self.row_ops = masked_only, row_ops
        self.run = run or BlockRunner()
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
        x_BTD = self._restore(self.embed(visible_BTE), partition.ids_restore_BL)
        *others, last = self.blocks
        for block in others:
            x_BTD = self.run(block, x_BTD)
        # Position 0 is [CLS], so patch i is token i + 1.
        ids_BM = partition.ids_masked_BM + 1
        if self.masked_only:
            x_BMD = self.run.some(last, self._gather(x_BTD, ids_BM), x_BTD)
            return self.pred(self.norm(x_BMD))
        return self._gather(self.pred(self.norm(self.run(last, x_BTD))), ids_BM)

    def _restore(self, visible_BTD: Tensor, ids_restore_BL: Tensor) -> Tensor:
        restore = partial(restore_tokens, kernels=self.kernels) if self.row_ops else repeated.restore_tokens
        return restore(visible_BTD, self.mask_token[0, 0], ids_restore_BL, self.pos_embed[0])

    def _gather(self, x_BTD: Tensor, ids_BM: Tensor) -> Tensor:
        return gather_tokens(x_BTD, ids_BM, kernels=self.kernels) if self.row_ops else repeated.gather(x_BTD, ids_BM)
