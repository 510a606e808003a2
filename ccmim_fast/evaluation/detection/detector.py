"""torchvision's Mask R-CNN over a vision transformer: maps of several strides, attention within windows, heads."""

# B batch, C channels, H height, W width, D width of the encoder, L patches row by row, R rows and C columns of patches

from collections import OrderedDict
from typing import Any, Literal

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import window_partition, window_reverse
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.encoders import OUTPUTS, keep_blocks_, maps_of
from ccmim_fast.models.tokens import attention_of

LEVELS = ("0", "1", "2", "3", "pool")  # torchvision's names; the last is every second pixel of the fourth
_RATIOS = (0.5, 1.0, 2.0)  # height to width of the anchors
_ANCHOR = 8  # strides: side of a level's anchors, 32 pixels at stride 4
_CANONICAL = 14  # patches: from this side on objects are pooled at the patch's own stride; 224 pixels, Lin et al.
_KEPT = 1000  # proposals after suppression, in training as in testing; Detectron
_BOX, _MASK = 7, 14  # places per side of an object that is pooled; He et al., 2017


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
    """Let all blocks but those in `whole` attend within windows; [CLS] and registers, which are in none, go.

    Raises ConfigError for an encoder with rotary positions, or whose blocks are attention and MLP in one.
    """
    if getattr(vit, "rope", None) is not None:
        raise ConfigError(f"detect.window={side}: rotary positions are of the whole grid; use detect.window=0")
    if attention_of(vit) is vit.blocks[0]:
        kind = type(vit.blocks[0]).__name__
        raise ConfigError(f"detect.window={side}: a {kind} is attention and MLP in one; use detect.window=0")
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    vit.pos_embed = nn.Parameter(vit.pos_embed[:, prefix:].detach().clone())
    vit.cls_token, vit.reg_token, vit.num_prefix_tokens = None, None, 0
    if isinstance(vit, VisionTransformerDistilled):  # its token of distillation goes, too
        vit.__class__, vit.dist_token = VisionTransformer, None
    for number, block in enumerate(vit.blocks):
        for name, part in [] if number in whole else list(block.named_modules()):
            if hasattr(part, "num_heads"):
                block.set_submodule(name, Windowed(part, tuple(vit.patch_embed.grid_size), side))


class NormalisedAndPadded(GeneralizedRCNNTransform):
    """Images come in the size in which they are shown, so nothing is resized."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict | None]:
        return image, target


def build_detector(
    vit: VisionTransformer,
    classes: int,
    *,
    kind: Literal["fpn", "simple"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    pad_to: int,
    width: int = 256,
    proposals: int = 512,
) -> MaskRCNN:
    """Build the detector; its encoder is `vit`, all else is new.

    In training (images [C, H, W] in 0..1, targets) -> losses by name; for testing see `detect`.

    Args:
        vit: takes images of any size; its patch is a multiple of 4.
        classes: number of them, without background.
        kind: of the pyramid. With `simple` come ViTDet's heads: two convolutions before proposals, four before boxes,
            LayerNorm in both and before masks.
        pad_to: the sides of a batch become multiples of so many pixels, a multiple of four patches.
        width: channels of the pyramid and of the heads' convolutions; four times as many features of an object.
        proposals: of an image, that the heads are trained on.
    """
    patch, simple = vit.patch_embed.patch_size[0], kind == "simple"
    anchors = AnchorGenerator(tuple((_ANCHOR * step,) for step in strides(patch)), (_RATIOS,) * len(LEVELS))
    box_head = TwoMLPHead(width * _BOX**2, 4 * width)
    if simple:
        box_head = FastRCNNConvFCHead((width, _BOX, _BOX), [width] * 4, [4 * width], LayerNorm2d)
    model = MaskRCNN(
        Backbone(vit, kind, width),
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(width, len(_RATIOS), conv_depth=2 if simple else 1),
        rpn_post_nms_top_n_train=_KEPT,
        rpn_post_nms_top_n_test=_KEPT,
        box_roi_pool=_pool(patch, _BOX),
        box_head=box_head,
        box_predictor=FastRCNNPredictor(4 * width, classes + 1),
        box_batch_size_per_image=proposals,
        mask_roi_pool=_pool(patch, _MASK),
        mask_head=MaskRCNNHeads(width, [width] * 4, 1, LayerNorm2d if simple else None),
        mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
    )
    for head in (model.rpn.head, model.roi_heads.box_predictor):
        head.register_forward_hook(_in_float32)
    model.transform = NormalisedAndPadded(1, 1, list(mean), list(std), size_divisible=pad_to)
    return model


def _in_float32(_: nn.Module, __: tuple, outputs: tuple) -> tuple:
    """Return as float32 what a head says of boxes: torchvision gives boxes its dtype, and bfloat16 would round them to
    8 pixels at 1024."""
    return tuple([part.float() for part in said] if isinstance(said, list) else said.float() for said in outputs)


def _pool(patch: int, size: int) -> MultiScaleRoIAlign:
    """Build RoIAlign at the level that suits the object's size (Lin et al., 2017, Eq. 1), in terms of the patch."""
    pool = MultiScaleRoIAlign(LEVELS[:4], size, sampling_ratio=2)
    # Known, where torchvision would round it from the first batch's sizes.
    pool.scales = [1 / step for step in strides(patch)[:4]]
    pool.map_levels = LevelMapper(2, 5, canonical_scale=_CANONICAL * patch)
    return pool


def detect(model: MaskRCNN, images: list[Tensor], sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Return boxes, labels from 1 on, scores, and masks [N, 1, H, W] in 0..1 of what is found in images [C, H, W] in
    0..1, as of images of the given sizes (height, width)."""
    shown, _ = model.transform(images)
    maps = model.backbone(shown.tensors)
    proposals, _ = model.rpn(shown, maps)
    found, _ = model.roi_heads(maps, proposals, shown.image_sizes)
    return model.transform.postprocess(found, shown.image_sizes, sizes)
