"""The neck's scales, the blocks that are decoded, parameter groups, windows and figures."""

# B batch, K classes, H height, W width

import pytest
import timm
import torch
from torch import nn

from ccmim_fast.config.evaluation import EvalOptimConfig
from ccmim_fast.evaluation.encoders import OUTPUTS, out_indices
from ccmim_fast.evaluation.finetune import build_optimizer
from ccmim_fast.evaluation.segmentation.model import Neck, Segmenter
from ccmim_fast.evaluation.segmentation.run import confusion, figures_of, pixel_loss, slide
from ccmim_fast.evaluation.segmentation.scenes import IGNORED

# What stands before the patches' tokens, and what pools all of them.
KINDS = {
    "cls": {"global_pool": "token"},
    "siglip": {"class_token": False, "global_pool": "map"},
    "registers": {"reg_tokens": 4, "global_pool": "avg", "fc_norm": True},
}


def segmenter(patch=8, side=32, depth=4, classes=5, kind="cls"):
    sizes = {"img_size": side, "patch_size": patch, "embed_dim": 24, "depth": depth, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **KINDS[kind], **sizes)
    sizes = {"decoder_dim": 16, "auxiliary_dim": 8, "dropout": 0.1, "init_std": 0.01}
    return Segmenter(vit, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), classes, **sizes)


def test_published_blocks_are_decoded():
    assert out_indices(12, OUTPUTS) == (3, 5, 7, 11)  # ViT-B
    assert out_indices(24, OUTPUTS) == (7, 11, 15, 23)  # ViT-L
    assert out_indices(2, OUTPUTS) == (0, 0, 1, 1)
    assert out_indices(1, OUTPUTS) == (0, 0, 0, 0)


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_scales_are_a_quarter_to_twice_the_patch(patch):
    model = segmenter(patch, side=64).eval()
    seen = []
    model.neck.register_forward_hook(lambda neck, given, made: seen.append((given[0], made)))
    logits_BKHW = model(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    assert logits_BKHW.shape == (2, 5, 64, 64)
    [(given, made)] = seen
    assert [64 / one.shape[-1] for one in given] == 4 * [patch]
    assert [64 / one.shape[-1] for one in made] == [patch / 4, patch / 2, patch, 2 * patch]
    assert all(one.shape[:2] == (2, 24) for one in made)
    assert made[2] is given[2]


def test_the_neck_takes_odd_grids():
    shapes = [one.shape[-2:] for one in Neck(6)([torch.randn(2, 6, 5, 7)] * 4)]
    assert shapes == [(20, 28), (10, 14), (5, 7), (2, 3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [2, 4])
def test_out_indices_are_outputs_of_their_blocks(depth, kind):
    """Also where a block is decoded twice; the final norm has no part in it."""
    model = segmenter(depth=depth, kind=kind).eval()
    of_block, given = {}, []
    for number, block in enumerate(model.vit.blocks):
        block.register_forward_hook(lambda _, inputs, made, number=number: of_block.update({number: made}))
    model.neck.register_forward_hook(lambda neck, inputs, made: given.extend(inputs[0]))
    model(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    for block, map_BDhw in zip(out_indices(depth, OUTPUTS), given, strict=True):
        assert torch.equal(map_BDhw.flatten(2).mT, of_block[block][:, -16:])


def test_images_are_normalised_as_for_the_encoder():
    model = segmenter().eval()
    seen = []
    model.vit.patch_embed.register_forward_hook(lambda _, inputs, made: seen.append(inputs[0]))
    images_BCHW = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    model(images_BCHW)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    torch.testing.assert_close(seen[0], (images_BCHW / 255 - mean) / std)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_one_group_and_learns(kind):
    """Blocks' rates fall by the layer decay, all that is new has the full rate; each parameter gets a gradient."""
    model = segmenter(kind=kind)
    optimizer = build_optimizer(model.vit, EvalOptimConfig(weight_decay=0.05, layer_decay=0.65), *model.new_parts())
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(map(id, grouped))) == len(list(model.parameters()))
    found = {id(p): (g.get("lr_scale", 1.0), g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    labels_BHW = torch.randint(0, 5, (2, 32, 32))
    sum(pixel_loss(one, labels_BHW) for one in model(torch.randint(0, 256, (2, 3, 32, 32)))).backward()
    for name, parameter in model.named_parameters():
        part, _, rest = name.partition(".")
        power = 0
        if part == "vit":
            power = 4 - int(rest.split(".")[1]) if rest.startswith("blocks.") else 5
        decay = 0.0 if parameter.ndim == 1 or rest in ("cls_token", "reg_token", "pos_embed") else 0.05
        assert found[id(parameter)] == (pytest.approx(0.65**power), decay), name
        assert parameter.grad.isfinite().all(), name
        # A bias before BatchNorm has a gradient of rounding errors alone.
        assert name == "neck.scales.0.0.bias" or parameter.grad.abs().max() > 0, name


def test_ignored_pixels_have_no_part_in_the_loss():
    """But they count among the pixels it is divided by; a crop of nothing else has a loss of 0, not NaN."""
    logits_BKHW = torch.randn(2, 3, 4, 4, dtype=torch.float32, requires_grad=True)
    labels_BHW = torch.randint(0, 3, (2, 4, 4), dtype=torch.uint8)
    labels_BHW[0] = IGNORED
    loss = pixel_loss(logits_BKHW, labels_BHW)
    expected = nn.functional.cross_entropy(logits_BKHW[1:], labels_BHW[1:].long()) / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (logits_BKHW.grad[0] == 0).all()
    assert pixel_loss(logits_BKHW, torch.full_like(labels_BHW, IGNORED)) == 0


def test_one_window_is_a_direct_pass():
    model = segmenter().eval()
    image_CHW = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(slide(model, image_CHW, (32, 32), 21, 2), model(image_CHW[None])[0])


@pytest.mark.parametrize("at_once", [1, 4, 99])
@pytest.mark.parametrize(("size", "stride"), [((13, 20), 5), ((8, 17), 8), ((9, 8), 3)])
def test_overlapping_windows_are_averaged(size, stride, at_once):
    """Against a float64 sum over pixels and windows, of a prediction that depends on the place in its window."""
    H, W = size
    image_CHW = torch.randn(3, H, W, dtype=torch.float64)
    weights_KC, place_hw = torch.randn(2, 3, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    given = []

    def predict(windows_NChw):
        given.append(len(windows_NChw))
        return torch.einsum("kc,nchw,hw->nkhw", weights_KC, windows_NChw, place_hw)

    found_KHW = slide(predict, image_CHW, (8, 8), stride, at_once)
    starts = [sorted({min(start, side - 8) for start in range(0, side, stride)}) for side in size]
    expected_KHW = torch.zeros(2, H, W, dtype=torch.float64)
    for y in range(H):
        for x in range(W):
            inside = [(y - top, x - left) for top in starts[0] for left in starts[1]]
            inside = [(v, u) for v, u in inside if 0 <= v < 8 and 0 <= u < 8]
            factor = sum(place_hw[v, u] for v, u in inside) / len(inside)
            expected_KHW[:, y, x] = factor * (weights_KC @ image_CHW[:, y, x])
    torch.testing.assert_close(found_KHW, expected_KHW)
    assert found_KHW.dtype == torch.float64
    assert sum(given) == len(starts[0]) * len(starts[1])
    assert max(given) <= at_once


def test_figures_of_a_case_by_hand():
    """Class 3 is neither labelled nor named; class 2 is not labelled and named once; an ignored pixel is nothing."""
    labels = torch.tensor([[0, 0, 0, 1], [1, 0, IGNORED, 1]], dtype=torch.uint8)
    named = torch.tensor([[0, 0, 1, 1], [1, 2, 3, 0]])
    counts = confusion(labels, named, 4)
    assert counts.tolist() == [[2, 1, 1, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    figures = figures_of(counts)
    assert figures["aAcc"] == pytest.approx(4 / 7)
    assert figures["mAcc"] == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert figures["mIoU"] == pytest.approx((2 / 5 + 2 / 4 + 0 / 1) / 3)


def test_counts_of_parts_add_up():
    labels, named = torch.randint(0, 4, (2, 50)), torch.randint(0, 4, (2, 50))
    whole = confusion(labels, named, 4)
    assert torch.equal(whole, sum(confusion(*part, 4) for part in zip(labels, named)))
    assert whole.sum() == 100
