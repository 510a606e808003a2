"""Feature maps of four strides from a vision transformer, which has one: a quarter, half, once and twice its patch."""

# B batch, C channels, H height, W width, D width of the encoder

from collections import OrderedDict
from typing import Literal

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
