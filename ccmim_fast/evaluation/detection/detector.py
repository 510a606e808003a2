"""torchvision's Mask R-CNN over a vision transformer and its pyramid."""

# B batch, C channels, H height, W width

from typing import Literal

from timm.layers import LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from ccmim_fast.evaluation.detection.backbone import LEVELS, Backbone, strides

_RATIOS = (0.5, 1.0, 2.0)  # height to width of the anchors
_ANCHOR = 8  # strides: side of a level's anchors, 32 pixels at stride 4
_CANONICAL = 14  # patches: from this side on objects are pooled at the patch's own stride; 224 pixels, Lin et al.
_KEPT = 1000  # proposals after suppression, in training as in testing; Detectron
_BOX, _MASK = 7, 14  # places per side of an object that is pooled; He et al., 2017


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
