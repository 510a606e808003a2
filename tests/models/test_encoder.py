"""The encoder's parts against timm's own forward pass."""

from functools import partial

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from tiny import images, tiny_model

from ccmim_fast.errors import ConfigError
from ccmim_fast.models.block import ViTBlock
from ccmim_fast.models.encoder import build_encoder
from ccmim_fast.models.tokens import embed, encode, folded_projection, prefix_tokens, tokens_of

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).double(), torch.tensor([0.2, 0.25, 0.3]).double()


def normalised(images_BHWC, mean, std):
    return ((images_BHWC.double() / 255 - mean) / std).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "arch",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_clip_224",
        "deit3_small_patch16_224",
        "deit_tiny_distilled_patch16_224",
    ],
)
def test_equals_timm(arch):
    """[CLS], registers, DeiT's token of distillation, pre-norm, positions with and without a place for [CLS]."""
    size = (28, 42) if "14" in arch else (32, 48)
    vit = build_encoder(arch, image_size=size, channels=3, depth=2).double().eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    pictures = images(2, size)
    expected = vit.forward_features(normalised(pictures, MEAN, STD))
    torch.testing.assert_close(tokens_of(vit, MEAN, STD)(pictures), expected)


@pytest.mark.parametrize(("channels", "patch"), [(1, 2), (2, 4), (5, 16), (3, 32)])
def test_any_channels_and_patch_size(channels, patch):
    size = (patch * 2, patch * 3)
    vit = (
        build_encoder("vit_tiny_patch16_224", image_size=size, channels=channels, patch_size=patch, depth=1)
        .double()
        .eval()
    )
    mean, std = torch.rand(channels).double(), torch.rand(channels).double() + 0.1
    pictures = images(2, size, channels)
    expected = vit.forward_features(normalised(pictures, mean, std))
    torch.testing.assert_close(tokens_of(vit, mean, std)(pictures), expected)


def test_folded_normalisation_in_bfloat16_is_as_good_as_eager():
    """Error of the folded embedding against float64, at most twice that of normalising first."""
    vit = build_encoder("vit_tiny_patch16_224", image_size=(224, 224), channels=3, depth=1)
    mean, std = MEAN.float(), STD.float()
    pictures = images(4, (224, 224))
    gold = embed(vit.double(), pictures, folded_projection(vit, MEAN, STD)).tokens
    vit.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        folded = embed(vit, pictures, folded_projection(vit, mean, std)).tokens
        eager = vit.patch_embed(normalised(pictures, MEAN, STD).float()) + vit.pos_embed[:, 1:]
    assert (folded - gold).abs().max() <= 2 * (eager - gold).abs().max()


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_clip_224"])
def test_cls_only_last_block_equals_the_full_one(arch):
    size = (28, 42) if "14" in arch else (32, 48)
    vit = build_encoder(arch, image_size=size, channels=3, depth=3).double()
    x_BLD = embed(vit, images(2, size), folded_projection(vit, MEAN, STD)).tokens
    x = torch.cat([prefix_tokens(vit).expand(2, -1, -1), x_BLD], dim=1).detach()
    torch.testing.assert_close(encode(vit, x, cls_only=True)[0], encode(vit, x)[0][:, :1])


@pytest.mark.parametrize("options", [{}, {"init_values": 0.1}, {"qk_norm": True}, {"drop_path": 0.5}])
def test_block_is_timms_where_timm_makes_it(options):
    """`block_fn=ViTBlock`: timm's forward, names and results, for all tokens and for some of them."""
    torch.manual_seed(0)
    ours = VisionTransformer(embed_dim=48, depth=2, num_heads=3, block_fn=partial(ViTBlock, **options)).double()
    theirs = VisionTransformer(embed_dim=48, depth=2, num_heads=3, block_fn=partial(Block, **options)).double()
    theirs.load_state_dict(ours.state_dict())
    x_BCHW = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    torch.manual_seed(1)
    found = ours(x_BCHW)
    torch.manual_seed(1)
    torch.testing.assert_close(found, theirs(x_BCHW))
    block, x_BTD = ours.blocks[0].eval(), torch.randn(2, 7, 48, dtype=torch.float64)
    torch.testing.assert_close(block(x_BTD, query_BQD=x_BTD[:, 2:5]), theirs.blocks[0].eval()(x_BTD)[:, 2:5])
    causal = theirs.blocks[0](x_BTD, is_causal=True)
    torch.testing.assert_close(block(x_BTD, is_causal=True), causal)
    assert not torch.equal(causal, block(x_BTD))


def test_state_dict_is_timms():
    vit = build_encoder("vit_small_patch16_224", image_size=(224, 224), channels=3)
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0)
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in vit.state_dict().items()}


def test_positions_are_fixed_and_zero_for_cls():
    model, _ = tiny_model()
    assert not model.encoder.pos_embed.requires_grad
    assert (model.encoder.pos_embed[:, 0] == 0).all()
    assert model.encoder.pos_embed[:, 1:].unique(dim=1).shape[1] == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (225, 224)}, r"data.image_size=225: must be a multiple of .* patch 16; nearest: 224"),
        ({"arch": "resnet18"}, "is a ResNet; expected timm's VisionTransformer or Eva"),
        ({"num_heads": 5}, "num_heads=5 must divide .*192; nearest: 4"),
        ({"embed_dim": 100}, "embed_dim=100 .* nearest: 96"),
        ({"embed_dim": 102}, "embed_dim=102 .* nearest: 96"),
    ],
)
def test_errors_name_the_nearest_valid_value(options, message):
    options = {"arch": "vit_tiny_patch16_224", "image_size": (224, 224), "channels": 3, **options}
    with pytest.raises(ConfigError, match=message):
        build_encoder(options.pop("arch"), **options)
