"""Attention within square windows, as in ViTDet (Li et al., 2022): cheap where an image has thousands of patches."""

# B batch, L patches row by row, R rows, C columns, S side of a window, D width

from typing import Any

import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class Windowed(nn.Module):
    """An attention [B, L, D] -> [B, L, D] that is carried out in each window alone.

    Where windows hang over the grid they are filled up with zeros, which are attended to (ViTDet).

    Args:
        attention: of tokens.
        grid: rows and columns of the patches.
        side: of a window, patches.
    """

    def __init__(self, attention: nn.Module, grid: tuple[int, int], side: int):
        super().__init__()
        self.attention, self.grid, self.side = attention, grid, side

    def forward(self, x_BLD: Tensor, **options: Any) -> Tensor:
        (rows, columns), side = self.grid, self.side
        x_BRCD = F.pad(x_BLD.unflatten(1, self.grid), (0, 0, 0, -columns % side, 0, -rows % side))
        over, along = x_BRCD.shape[1] // side, x_BRCD.shape[2] // side
        windows = x_BRCD.unflatten(2, (along, side)).unflatten(1, (over, side)).transpose(2, 3)
        windows = self.attention(windows.reshape(-1, side * side, x_BLD.shape[-1]), **options)
        windows = windows.reshape(-1, over, along, side, side, x_BLD.shape[-1]).transpose(2, 3)
        return windows.flatten(3, 4).flatten(1, 2)[:, :rows, :columns].flatten(1, 2)


def use_windows_(vit: VisionTransformer, side: int, whole: tuple[int, ...]) -> None:
    """Let all blocks but those in `whole` attend within windows; [CLS] and registers, which are in none, go."""
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    vit.pos_embed = nn.Parameter(vit.pos_embed[:, prefix:].detach().clone())
    vit.cls_token, vit.reg_token, vit.num_prefix_tokens = None, None, 0
    for number, block in enumerate(vit.blocks):
        if number not in whole:
            block.attn = Windowed(block.attn, tuple(vit.patch_embed.grid_size), side)
