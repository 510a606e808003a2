"""Parts of one's own: timm's modules with timm's arithmetic, in all ways that a step takes through a block."""

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked
from tiny import images, tiny_model
from torch import nn

from ccmim_fast.errors import ConfigError
from ccmim_fast.models.encoder import build_encoder
from ccmim_fast.models.scores import can_fold, eq4_of_blocks
from ccmim_fast.models.tokens import embed, encode, folded_projection, tokens_of, with_prefix
from ccmim_fast.optim.optimizer import build_optimizer

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).double(), torch.tensor([0.2, 0.25, 0.3]).double()
ARCH, SIZES = "vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
GATED = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 16 / 3}
# Our settings, and timm's arguments by which a reader of timm's documentation builds the same.
PARTS = {
    "plain": ({}, {}),
    "learned": ({"positions": "learned"}, {}),
    "registers": ({"registers": 3}, {"reg_tokens": 3}),
    "layer_scale": ({"layer_scale": 0.1}, {"init_values": 0.1}),
    "qk_norm": ({"qk_norm": True}, {"qk_norm": True}),
    "swiglu": ({"mlp": "swiglu"}, GATED),
    "all": (
        {"positions": "learned", "registers": 3, "layer_scale": 0.1, "qk_norm": True, "mlp": "swiglu"},
        {"reg_tokens": 3, "init_values": 0.1, "qk_norm": True, **GATED},
    ),
}


def pair(name, arch=ARCH, **more):
    """Our encoder with random vectors, whose initial values would hide mistakes, and timm's with the same weights."""
    ours, timms = PARTS[name]
    vit = build_encoder(arch, image_size=(16, 24), channels=3, **SIZES, **ours, **more).double()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    rate = {"drop_path_rate": more["drop_path"]} if more else {}
    fixed = {"num_classes": 0, "img_size": (16, 24), "class_token": True, "global_pool": "token"}
    theirs = timm.create_model(arch, **fixed, **SIZES, **timms, **rate).double()
    theirs.load_state_dict(vit.state_dict(), strict=True)
    return vit, theirs


def normalised(images_BHWC):
    return ((images_BHWC.double() / 255 - MEAN) / STD).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", PARTS)
def test_tokens_are_timms(name):
    vit, theirs = pair(name)
    pictures = images(2, (16, 24))
    torch.testing.assert_close(
        tokens_of(vit, MEAN, STD)(pictures), theirs.eval().forward_features(normalised(pictures))
    )
    new = {"registers": "reg_token", "layer_scale": "ls1.gamma", "qk_norm": "attn.q_norm.weight"}
    assert [part for part, ending in new.items() if any(key.endswith(ending) for key in vit.state_dict())] == (
        list(new) if name == "all" else [name] if name in new else []
    )


@pytest.mark.parametrize("name", ["plain", "all"])
def test_training_drops_paths_as_timm(name):
    vit, theirs = pair(name, drop_path=0.5)
    pictures = images(8, (16, 24))
    torch.manual_seed(1)
    found = tokens_of(vit.train(), MEAN, STD)(pictures)
    torch.manual_seed(1)
    expected = theirs.train().forward_features(normalised(pictures))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, theirs.eval().forward_features(normalised(pictures)))


@pytest.mark.parametrize("name", ["registers", "qk_norm", "all"])
def test_attention_of_cls_is_that_of_normed_queries_and_keys(name):
    """Eq. 4 and the softmaxed rows, against maps that are made of timm's own layers."""
    vit, theirs = pair(name)
    x_BLD = embed(vit, images(2, (16, 24)), folded_projection(vit, MEAN, STD)).tokens.detach()
    x, prefix, rows = with_prefix(vit, x_BLD), vit.num_prefix_tokens, []
    assert prefix == (1 if name == "qk_norm" else 4)
    assert can_fold(vit) == (name == "registers")
    for block, logits in zip(theirs.blocks, eq4_of_blocks(vit, x_BLD)):
        attn, normed = block.attn, block.norm1(x)
        q, k, _ = attn.qkv(normed).reshape(2, -1, 3, 3, 16).permute(2, 0, 3, 1, 4)
        map_BNTT = attn.q_norm(q) @ attn.k_norm(k).transpose(-1, -2) / 4
        expected = map_BNTT[:, :, 0, prefix:].mean(1)
        torch.testing.assert_close(logits.softmax(1), expected.softmax(1))
        rows.append(map_BNTT.softmax(-1)[:, :, 0, prefix:].mean(1))
        x = block(x)
    _, found = encode(vit, with_prefix(vit, x_BLD), read_blocks=2)
    torch.testing.assert_close(found, (sum(rows) / 2 * 6).log())


@pytest.mark.parametrize("name", ["swiglu", "all"])
def test_cls_alone_equals_the_full_block(name):
    vit, _ = pair(name)
    x_BLD = embed(vit, images(2, (16, 24)), folded_projection(vit, MEAN, STD)).tokens
    x_BTD = with_prefix(vit, x_BLD)
    torch.testing.assert_close(encode(vit, x_BTD, cls_only=True)[0], encode(vit, x_BTD)[0][:, :1])


@pytest.mark.parametrize("arch", [ARCH, "aimv2_1b_patch14_224"])
def test_learned_positions_get_the_gradient_of_visible_patches(arch):
    """The step's gradient is that of plain autograd; the second has a norm behind its projection."""
    model, _ = tiny_model(model={"arch": arch, "positions": "learned"}, mask={"strategy": "random"})
    pictures, ids = images(3), torch.arange(3)
    output = model(pictures, ids, 0)
    weights = torch.randn_like(output.pred_BMP)
    position = model.encoder.pos_embed
    (found,) = torch.autograd.grad((output.pred_BMP * weights).sum(), position)
    (expected,) = torch.autograd.grad((model.predict(pictures, output.partition) * weights).sum(), position)
    torch.testing.assert_close(found, expected)
    seen = output.partition.ids_visible_BK.unique()
    assert len(seen) < 24, "else every position has a gradient"
    assert (found[0, 1:].abs().sum(1) > 0).nonzero().flatten().tolist() == seen.tolist()
    assert found[0, 0].any(), "[CLS] has a position too"


def test_positions_are_learned_where_they_are_asked_for():
    """Of the encoder alone, from N(0, 0.02), and without decay; the decoder's stay fixed sines and cosines."""
    fixed, _ = tiny_model()
    model, _ = tiny_model(model={"positions": "learned", "registers": 2, "layer_scale": 0.1, "qk_norm": True})
    assert not fixed.encoder.pos_embed.requires_grad
    assert model.encoder.pos_embed.requires_grad
    assert model.encoder.pos_embed.shape == (1, 1 + 2 + 24, 48)
    assert 0.015 < model.encoder.pos_embed.std() < 0.025
    assert not model.decoder.pos_embed.requires_grad
    assert torch.equal(model.decoder.pos_embed, fixed.decoder.pos_embed)


@pytest.mark.parametrize("decay_tokens", [False, True])
def test_decay(decay_tokens):
    """Registers are decayed with the other tokens; layer scale, norms of queries and keys, and positions never."""
    parts = {"positions": "learned", "registers": 2, "layer_scale": 0.1, "qk_norm": True, "mlp": "swiglu"}
    model, _ = tiny_model(torch.float32, model=parts)
    options = {"lr": 1e-3, "weight_decay": 0.05, "betas": (0.9, 0.95), "decay_tokens": decay_tokens}
    optimizer = build_optimizer("adamw", model, **options)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    of = {name: decays[id(p)] for name, p in model.encoder.named_parameters()}
    assert of["pos_embed"] == of["blocks.0.ls1.gamma"] == of["blocks.0.attn.q_norm.weight"] == 0
    assert of["reg_token"] == of["cls_token"] == (0.05 if decay_tokens else 0)
    assert of["blocks.0.mlp.fc1.weight"] == of["blocks.0.mlp.fc2.weight"] == 0.05


@pytest.mark.parametrize(
    ("arch", "mlp", "width", "hidden"),
    [
        ("vit_base_patch16_224", "swiglu", 768, (4096, 2048)),
        ("vit_small_patch16_224", "swiglu", 384, (2048, 1024)),
        ("vit_base_patch16_224", "swiglu", 100, (544, 272)),  # 266.7 becomes a multiple of 8
        ("vit_giant_patch14_dinov2", "gelu", 1536, (6144, 6144)),
        ("vit_giant_patch14_dinov2", "swiglu", 1536, (8192, 4096)),
        ("vit_base_patch16_clip_quickgelu_224", "gelu", 768, (3072, 3072)),
    ],
)
def test_an_mlp_has_as_many_weights(arch, mlp, width, hidden):
    with torch.device("meta"):
        vit = build_encoder(
            arch, image_size=(28, 28), channels=3, patch_size=14, embed_dim=width, num_heads=4, depth=1, mlp=mlp
        )
    found = vit.blocks[0].mlp
    assert (found.fc1.out_features, found.fc2.in_features) == hidden
    assert isinstance(found.act, nn.SiLU) == (mlp == "swiglu")
    assert mlp == "swiglu" or torch.equal(found.act(torch.ones(1)), nn.GELU()(torch.ones(1)))


@pytest.mark.parametrize(
    ("arch", "parts", "words"),
    [
        ("deit_tiny_distilled_patch16_224", {"registers": 2}, "model.registers=2: .*VisionTransformerDistilled"),
        ("vit_base_patch16_rpn_224", {"layer_scale": 0.1}, "model.layer_scale=0.1: .*ResPostBlock.* leave it out"),
        ("vit_base_patch16_xp_224", {"mlp": "swiglu"}, "model.mlp=swiglu: .*ParallelScalingBlock"),
        ("eva02_tiny_patch14_224", {"mlp": "gelu"}, "model.mlp=gelu: eva02_tiny_patch14_224"),
        ("vit_small_patch16_dinov3", {"positions": "learned"}, "model.positions=learned: .* rotary .* rope$"),
        ("eva02_enormous_patch14_clip_224", {"qk_norm": True}, "model.qk_norm=true: .*EvaBlockPostNorm.* leave it out"),
        ("vit_base_r50_s16_224", {}, "convolutional network, .* masked pixels; take .*vit_base_patch16_224"),
        ("vitamin_small_224", {}, "convolutional network"),
    ],
)
def test_what_an_architecture_cannot_have_is_said(arch, parts, words):
    sizes = {"embed_dim": 48, "depth": 1, "num_heads": 3}
    with pytest.raises(ConfigError, match=words):
        build_encoder(arch, image_size=(224, 224), channels=3, **sizes, **parts)
