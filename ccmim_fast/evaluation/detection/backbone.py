"""A vision transformer as a detector's backbone: feature maps of several strides, and attention within windows."""

# B batch, C channels, H height, W width, D width of the encoder, L patches row by row, R rows and C columns of patches

from collections import OrderedDict
from typing import Any, Literal

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ccmim_fast.evaluation.encoders import OUTPUTS, out_indices

LEVELS = ("0", "1", "2", "3", "pool")  # torchvision's names; the last is every second pixel of the fourth


def strides(patch: int) -> tuple[int, ...]:
    """Pixels from one place of each of the five maps to the next. `patch` is a multiple of 4."""
    return tuple(patch * 2**level // 4 for level in range(5))


class Backbone(nn.Module):
    """Images [B, C, H, W] -> maps {"0", "1", "2", "3", "pool": [B, `out_channels`, h, w]} in float32.

    Float32, whatever the precision: torchvision gives anchors the dtype of the maps.

    Args:
        vit: any size of images that is a multiple of four patches.
        kind: `fpn`, a feature pyramid network over four blocks' outputs (BEiT, CAE), or `simple`, over the last
            block's (ViTDet).
        channels: of each map.
    """

    def __init__(self, vit: VisionTransformer, kind: Literal["fpn", "simple"], channels: int):
        super().__init__()
        # What no map goes through has no gradient, which other ranks would wait for.
        vit.reset_classifier(0, "")
        vit.norm = vit.fc_norm = nn.Identity()
        self.vit, depth = vit, len(vit.blocks)
        self.blocks = out_indices(depth, OUTPUTS if kind == "fpn" else ((1, 1),) * 4)
        self.pyramid = (FourStrides if kind == "fpn" else SimplePyramid)(vit.embed_dim, channels)
        self.out_channels = channels  # what torchvision asks for

    def forward(self, x_BCHW: Tensor) -> OrderedDict[str, Tensor]:
        taken = sorted(set(self.blocks))
        outputs = self.vit.forward_intermediates(x_BCHW, indices=taken, intermediates_only=True)
        by_block = dict(zip(taken, outputs))
        maps = self.pyramid([by_block[block] for block in self.blocks])
        return OrderedDict((name, map_BCHW.float()) for name, map_BCHW in maps.items())


def _rescaled(width: int, level: int, narrow: bool) -> tuple[list[nn.Module], int]:
    """Layers from the patch's stride to a level's, and the width behind them; `narrow` halves it as the map grows."""
    half, quarter = (width // 2, width // 4) if narrow else (width, width)
    if level == 0:
        between = [LayerNorm2d(half), nn.GELU()]
        return [nn.ConvTranspose2d(width, half, 2, 2), *between, nn.ConvTranspose2d(half, quarter, 2, 2)], quarter
    if level == 1:
        return [nn.ConvTranspose2d(width, half, 2, 2)], half
    return [nn.Identity() if level == 2 else nn.MaxPool2d(2)], width


class FourStrides(nn.Module):
    """Four blocks' outputs to four strides, then a feature pyramid network."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.levels = nn.ModuleList(nn.Sequential(*_rescaled(width, level, narrow=False)[0]) for level in range(4))
        self.fpn = FeaturePyramidNetwork([width] * 4, channels, LastLevelMaxPool())

    def forward(self, outputs: list[Tensor]) -> OrderedDict[str, Tensor]:
        maps = (level(output) for level, output in zip(self.levels, outputs))
        return self.fpn(OrderedDict(zip(LEVELS, maps)))


class SimplePyramid(nn.Module):
    """ViTDet's: each level by itself, 1 x 1 and 3 x 3 convolutions behind it, with LayerNorm over the channels."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.levels = nn.ModuleList()
        for level in range(4):
            layers, narrowed = _rescaled(width, level, narrow=True)
            layers += [nn.Conv2d(narrowed, channels, 1, bias=False), LayerNorm2d(channels)]
            layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)]
            self.levels.append(nn.Sequential(*layers))
        self.last = LastLevelMaxPool()

    def forward(self, outputs: list[Tensor]) -> OrderedDict[str, Tensor]:
        maps = [level(output) for level, output in zip(self.levels, outputs)]
        maps, names = self.last(maps, [], list(LEVELS[:4]))
        return OrderedDict(zip(names, maps))


class Windowed(nn.Module):
    """An attention [B, L, D] -> [B, L, D] within each square window alone, as in ViTDet (Li et al., 2022).

    Cheap where an image has thousands of patches.

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
