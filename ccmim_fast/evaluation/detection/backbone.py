"""A vision transformer becomes a detector's backbone: maps of several strides, and attention within windows."""

# B batch, C channels, H height, W width, D width of the encoder, L patches row by row, R rows and C columns of patches

from collections import OrderedDict
from typing import Any, Literal

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.swin_transformer import window_partition, window_reverse
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from ccmim_fast.evaluation.encoders import OUTPUTS, keep_blocks_, maps_of

LEVELS = ("0", "1", "2", "3", "pool")  # torchvision's names; the last is every second pixel of the fourth


def strides(patch: int) -> tuple[int, ...]:
    """Return the pixels from one place of each of the five maps to the next. `patch` is a multiple of 4."""
    return tuple(patch * 2**level // 4 for level in range(5))


class Backbone(nn.Module):
    """Images [B, C, H, W] -> maps {"0", "1", "2", "3", "pool": [B, `out_channels`, h, w]} in float32.

    Float32, whatever the precision: torchvision gives anchors the dtype of the maps. `vit` takes any size of images
    that is a multiple of four patches. `kind`: `fpn`, a feature pyramid network over four blocks' outputs (BEiT, CAE),
    or `simple`, over the last block's (ViTDet).
    """

    def __init__(self, vit: VisionTransformer, kind: Literal["fpn", "simple"], channels: int):
        super().__init__()
        self.vit, self.blocks = vit, keep_blocks_(vit, OUTPUTS if kind == "fpn" else ((1, 1),) * 4)
        self.pyramid = Pyramid(vit.embed_dim, channels, kind == "simple")
        self.out_channels = channels  # what torchvision asks for

    def forward(self, x_BCHW: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.pyramid(maps_of(self.vit, self.blocks, x_BCHW))
        return OrderedDict((name, map_BCHW.float()) for name, map_BCHW in maps.items())


def _rescaled(width: int, level: int, narrow: bool) -> tuple[list[nn.Module], int]:
    """Return layers from the patch's stride to a level's, and the width behind them; `narrow` halves it each time."""
    half, quarter = (width // 2, width // 4) if narrow else (width, width)
    if level == 0:
        between = [LayerNorm2d(half), nn.GELU()]
        return [nn.ConvTranspose2d(width, half, 2, 2), *between, nn.ConvTranspose2d(half, quarter, 2, 2)], quarter
    if level == 1:
        return [nn.ConvTranspose2d(width, half, 2, 2)], half
    return [nn.Identity() if level == 2 else nn.MaxPool2d(2)], width


class Pyramid(nn.Module):
    """Four blocks' outputs become maps of four strides, then a feature pyramid network joins these.

    A `simple` one (ViTDet) leaves each level by itself: 1 x 1 and 3 x 3 convolutions, with LayerNorm over the channels.
    """

    def __init__(self, width: int, channels: int, simple: bool):
        super().__init__()
        self.levels = nn.ModuleList()
        for level in range(4):
            layers, narrowed = _rescaled(width, level, narrow=simple)
            if simple:
                layers += [nn.Conv2d(narrowed, channels, 1, bias=False), LayerNorm2d(channels)]
                layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)]
            self.levels.append(nn.Sequential(*layers))
        self.fpn = nn.Identity() if simple else FeaturePyramidNetwork([width] * 4, channels)

    def forward(self, outputs: list[Tensor]) -> OrderedDict[str, Tensor]:
        maps = self.fpn(OrderedDict((name, level(x)) for name, level, x in zip(LEVELS, self.levels, outputs)))
        return OrderedDict(maps, pool=F.max_pool2d(maps["3"], 1, stride=2))


class Windowed(nn.Module):
    """This attention, [B, L, D] -> [B, L, D], stays within each square window (ViTDet): cheap at thousands of patches.

    `grid` is rows and columns of the patches, `side` that of a window in patches. Windows that hang over the grid are
    filled up with zeros, which are attended to (ViTDet).
    """

    def __init__(self, attention: nn.Module, grid: tuple[int, int], side: int):
        super().__init__()
        self.attention, self.grid, self.side = attention, grid, side

    def forward(self, x_BLD: Tensor, **options: Any) -> Tensor:
        (rows, columns), side = self.grid, self.side
        x_BRCD = F.pad(x_BLD.unflatten(1, self.grid), (0, 0, 0, -columns % side, 0, -rows % side))
        windows = self.attention(window_partition(x_BRCD, (side, side)).flatten(1, 2), **options)
        return window_reverse(windows, (side, side), *x_BRCD.shape[1:3])[:, :rows, :columns].flatten(1, 2)


def use_windows_(vit: VisionTransformer, side: int, whole: tuple[int, ...]) -> None:
    """Let all blocks but those in `whole` attend within windows; [CLS] and registers, which are in none, go."""
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    vit.pos_embed = nn.Parameter(vit.pos_embed[:, prefix:].detach().clone())
    vit.cls_token, vit.reg_token, vit.num_prefix_tokens = None, None, 0
    for number, block in enumerate(vit.blocks):
        if number not in whole:
            block.attn = Windowed(block.attn, tuple(vit.patch_embed.grid_size), side)
