"""The detector's parts: pyramids, windows, anchors and pooling at any patch, rates of layers."""

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention
from torch import nn
from torchvision.models.detection.image_list import ImageList

from ccmim_fast.config.evaluation import EvalOptimConfig
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.detection.detector import (
    LEVELS,
    Backbone,
    Windowed,
    build_detector,
    detect,
    strides,
    use_windows_,
)
from ccmim_fast.evaluation.encoders import OUTPUTS, QUARTERS, out_indices
from ccmim_fast.evaluation.finetune import build_optimizer

KINDS = ("fpn", "simple")


def encoder(patch=8, depth=3, size=64, **options):
    sizes = {"img_size": size, "patch_size": patch, "embed_dim": 48, "depth": depth, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, dynamic_img_size=True, **sizes, **options)


def detector(kind="fpn", patch=8, **options):
    shared = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "pad_to": 4 * patch, "width": 16, "proposals": 8}
    return build_detector(encoder(patch, **options), 3, kind=kind, **shared)


def targets(*boxes, size=(64, 64)):
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = 1
    labels = torch.ones(len(boxes), dtype=torch.int64)
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": labels, "masks": masks}


def test_blocks_are_those_of_the_publications():
    assert out_indices(12, OUTPUTS) == (3, 5, 7, 11)
    assert out_indices(24, OUTPUTS) == (7, 11, 15, 23)
    assert out_indices(12, QUARTERS) == (2, 5, 8, 11)
    assert out_indices(2, OUTPUTS) == (0, 0, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patch", [4, 8, 16])
def test_maps_have_the_strides_that_are_said(kind, patch):
    """Of images of another size than the encoder was built for."""
    height, width = 8 * patch, 12 * patch
    maps = Backbone(encoder(patch), kind, 20)(torch.randn(2, 3, height, width))
    assert tuple(maps) == LEVELS
    for map_BCHW, stride in zip(maps.values(), strides(patch)):
        assert map_BCHW.shape == (2, 20, height // stride, width // stride)
    assert strides(16) == (4, 8, 16, 32, 64)


def test_each_output_goes_to_its_stride():
    """Blocks 3 5 7 11 to strides of a quarter, half, once and twice the patch: the deeper, the coarser."""
    backbone = Backbone(encoder(depth=12), "fpn", 16).eval()
    seen = []
    for level in backbone.pyramid.levels:
        level.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    images = torch.randn(1, 3, 64, 64)
    backbone(images)
    outputs = backbone.vit.forward_intermediates(images, indices=[3, 5, 7, 11], intermediates_only=True)
    for taken, output in zip(seen, outputs):
        torch.testing.assert_close(taken, output, rtol=0, atol=0)


@pytest.mark.parametrize("patch", [4, 16])
def test_anchors_are_eight_strides_wide_and_a_stride_apart(patch):
    model = detector(patch=patch)
    images = torch.zeros(1, 3, 8 * patch, 8 * patch)
    maps = list(model.backbone(images).values())
    [anchors] = model.rpn.anchor_generator(ImageList(images, [(8 * patch, 8 * patch)]), maps)
    sizes = [3 * map_BCHW[0, 0].numel() for map_BCHW in maps]
    for of_level, stride in zip(anchors.split(sizes), strides(patch)):
        square = of_level[1::3]  # of the ratios the second is 1
        assert (square[:, 2:] - square[:, :2] == 8 * stride).all()
        columns = ((square[:, 0] + square[:, 2]) / 2).unique()
        torch.testing.assert_close(columns, stride * torch.arange(len(columns)).float())


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_objects_are_pooled_where_they_lie_at_the_level_of_their_size(patch):
    """Each map holds the x of its own places: a pooled object reads its own x, off by less than a place."""
    pool = detector(patch=patch).roi_heads.box_roi_pool
    side = 64 * patch
    maps = {}
    for name, stride in zip(LEVELS, strides(patch)):
        x_W = (torch.arange(side // stride) + 0.5) * stride
        maps[name] = x_W.expand(1, 1, side // stride, -1).contiguous()
    boxes = torch.tensor([[1, 1, 1 + w, 1 + w] for w in (3, 7, 14, 28)]).float() * patch
    assert pool.map_levels([boxes]).tolist() == [0, 1, 2, 3]
    read = pool(maps, [boxes], [(side - 1, side - 1)])[:, 0, :, 3].mean(1)
    off = (read - boxes[:, [0, 2]].mean(1)).abs()
    assert (off <= torch.tensor(strides(patch)[:4])).all()


def test_boxes_stay_float32_in_half_precision():
    """Rounded to bfloat16 they would lie on multiples of 8 pixels from 1024 on."""
    model, seen = detector(), []
    model.rpn.register_forward_hook(lambda _, __, result: seen.append(result[0][0]))
    images = [torch.rand(3, 64, 64)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(images, [targets((5, 5, 30, 40))])
        model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.0, 3
        [found] = detect(model.eval(), images, [(2048, 2048)])
    assert all(loss.isfinite() for loss in losses.values())
    [proposals, _] = seen
    assert proposals.dtype == found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert (proposals.bfloat16().float() != proposals).any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {map_BCHW.dtype for map_BCHW in model.backbone(torch.zeros(1, 3, 64, 64)).values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_a_gradient(kind):
    """Ranks would wait for one that has none; with objects, and where a crop has left none."""
    model = detector(kind, depth=2)
    for boxes in (((5, 5, 30, 40),), ()):
        model.zero_grad(set_to_none=True)
        sum(model([torch.rand(3, 64, 64)], [targets(*boxes)]).values()).backward()
        assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_what_is_found_is_in_the_coordinates_of_the_original():
    """Shown at half its size in a padded batch; heads are told what to find."""
    model = detector().eval()
    told = torch.tensor([[4.0, 2.0, 24.0, 12.0]])

    def heads(maps, proposals, sizes):
        masks = torch.ones(1, 1, 28, 28)
        one = {"boxes": told, "labels": torch.tensor([2]), "scores": torch.tensor([0.9]), "masks": masks}
        return [dict(one) for _ in sizes], {}

    model.roi_heads.forward = heads
    found = detect(model, [torch.rand(3, 30, 50), torch.rand(3, 40, 40)], [(60, 100), (40, 40)])
    assert found[0]["boxes"].tolist() == [[8, 4, 48, 24]]
    assert found[0]["masks"].shape == (1, 1, 60, 100)
    assert (found[0]["masks"][0, 0] > 0.5).sum() == pytest.approx(40 * 20, rel=0.1)
    assert found[1]["boxes"].tolist() == [[4, 2, 24, 12]]


@pytest.mark.parametrize("kind", KINDS)
def test_rates_fall_from_the_pyramid_downwards(kind):
    """Every weight is in one group: 1 for what is new, decay^(depth - i) for block i, decay^(depth + 1) below."""
    model = detector(kind, depth=3)
    optim = EvalOptimConfig(weight_decay=0.05, layer_decay=0.75)
    optimizer = build_optimizer(model.backbone.vit, optim, model.backbone.pyramid, model.rpn, model.roi_heads)
    listed = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters())
    found = {id(p): (g.get("lr_scale", 1.0), g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        words = name.removeprefix("backbone.vit.").split(".")
        power = 0 if words[0] in ("backbone", "rpn", "roi_heads") else 3 - int(words[1]) if words[0] == "blocks" else 4
        decay = 0.0 if parameter.ndim == 1 or words[0] in ("cls_token", "pos_embed") else 0.05
        assert found[id(parameter)] == (pytest.approx(0.75**power), decay), name


def test_windows_attend_within_themselves():
    """5 x 7 patches in windows of 3: equal to attention to all places, zeros filled in, where windows are masked."""
    attention = Attention(24, num_heads=3, qkv_bias=True).eval()
    x_BLD = torch.randn(2, 35, 24)
    got = Windowed(attention, (5, 7), 3)(x_BLD)
    filled = torch.zeros(2, 6, 9, 24)
    filled[:, :5, :7] = x_BLD.unflatten(1, (5, 7))
    rows, columns = torch.meshgrid(torch.arange(6) // 3, torch.arange(9) // 3, indexing="ij")
    window = (3 * rows + columns).flatten()
    expected = attention(filled.flatten(1, 2), attn_mask=window[:, None] == window)
    torch.testing.assert_close(got, expected.unflatten(1, (6, 9))[:, :5, :7].flatten(1, 2))


def test_windows_as_large_as_the_image_change_nothing():
    """But for [CLS], which is gone."""
    vit = encoder(depth=4, class_token=False, global_pool="avg").eval()
    images = torch.randn(1, 3, 64, 64)
    before = vit.forward_intermediates(images, indices=[3], intermediates_only=True)[0]
    use_windows_(vit, 8, (1,))
    assert [type(block.attn) is Windowed for block in vit.blocks] == [True, False, True, True]
    torch.testing.assert_close(vit.forward_intermediates(images, indices=[3], intermediates_only=True)[0], before)


def test_windows_leave_prefix_tokens_out():
    vit = encoder(depth=4, reg_tokens=2)
    positions = vit.pos_embed[:, -64:].detach().clone()
    use_windows_(vit, 3, (3,))
    assert torch.equal(vit.pos_embed, positions)
    assert isinstance(vit.pos_embed, nn.Parameter)
    assert Backbone(vit, "simple", 8)(torch.randn(1, 3, 64, 64))["2"].shape == (1, 8, 8, 8)


def test_windows_are_of_every_attention_of_a_block_and_leave_no_token_before_the_patches():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2, "num_classes": 0}
    for arch, count in (("deit_tiny_distilled_patch16_224", 1), ("vit_base_patch16_18x2_224", 2)):
        vit = timm.create_model(arch, **sizes)
        use_windows_(vit, 2, (1,))
        found = [sum(isinstance(part, Windowed) for part in block.modules()) for block in vit.blocks]
        assert found == [count, 0], arch
        assert vit.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 24)
    with pytest.raises(ConfigError, match=r"detect\.window=2: a ParallelScalingBlock is attention and MLP in one"):
        use_windows_(timm.create_model("vit_base_patch16_xp_224", **sizes), 2, (1,))
