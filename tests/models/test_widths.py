"""A width that does not fit is refused with one that does, for every kind of block."""

import re

import pytest
import torch
from tiny import images

from ccmim_fast.errors import ConfigError
from ccmim_fast.models.encoder import build_encoder
from ccmim_fast.models.tokens import tokens_of

STANDARD, GATED, ROTARY = "vit_tiny_patch16_224", "vit_giant_patch14_reg4_dinov2", "vit_small_patch16_dinov3"
DIFFERENTIAL = "vit_dlittle_patch16_reg1_gap_256"
BLOCKS = (STANDARD, GATED, ROTARY, DIFFERENTIAL, "vit_base_patch16_18x2_224", "vit_base_patch16_xp_224")
BLOCKS += ("vit_dpwee_patch16_reg1_gap_256", "vit_base_patch16_rpn_224", "eva02_base_patch14_224")
BLOCKS += ("eva02_enormous_patch14_clip_224", "deit_tiny_distilled_patch16_224")
SIZES = ({"embed_dim": 46}, {"embed_dim": 50, "num_heads": 5}, {"embed_dim": 52, "num_heads": 3}, {"num_heads": 7})


def sized(arch, **sizes):
    vit = build_encoder(arch, image_size=(32, 32), channels=3, patch_size=8, depth=1, **sizes)
    tokens_BTD = tokens_of(vit, torch.zeros(3), torch.ones(3))(images(2, (32, 32)))
    assert tokens_BTD.isfinite().all()
    return vit.embed_dim


def nearest(arch, sizes, **more):
    """The sizes with what the refusal names as nearest; as they are where nothing is refused."""
    try:
        sized(arch, **sizes, **more)
    except ConfigError as error:
        key, number = re.match(r"model\.(\w+)=\d+.* nearest: (\d+)$", str(error)).groups()
        return sizes | {key: int(number)}
    return sizes


@pytest.mark.parametrize(
    ("arch", "positions"), [*((arch, "sincos") for arch in BLOCKS), (STANDARD, "learned"), (DIFFERENTIAL, "learned")]
)
def test_the_nearest_width_is_valid(arch, positions):
    for sizes in SIZES[: 4 if arch in (STANDARD, ROTARY, DIFFERENTIAL) else 3]:  # others are a thousand wide
        sized(arch, **nearest(arch, sizes, positions=positions), positions=positions)


@pytest.mark.parametrize(
    ("arch", "sizes", "words"),
    [
        (STANDARD, {"embed_dim": 50, "num_heads": 5}, r"model.embed_dim=50 must be a multiple of 20 \(5 heads\)"),
        (GATED, {"embed_dim": 64, "num_heads": 4}, "model.embed_dim=64: the MLP .* gates .* would be 341; nearest: 68"),
        ("vit_base_patch16_xp_224", {"embed_dim": 64}, r"model.embed_dim=64 must be a multiple of 12 \(12 heads\)"),
        (DIFFERENTIAL, {"embed_dim": 45, "positions": "learned"}, r"embed_dim=45 .* 10 \(5 heads\); nearest: (40|50)"),
        (ROTARY, {"embed_dim": 64}, r"embed_dim=64 must be a multiple of 24 \(6 heads\); nearest: 72"),
    ],
)
def test_the_reason_is_named(arch, sizes, words):
    with pytest.raises(ConfigError, match=words):
        sized(arch, **sizes)


def test_learned_positions_ask_for_no_multiple_of_four():
    assert sized(STANDARD, embed_dim=46, num_heads=2, positions="learned") == 46
