"""Rotary positions and the other parts of timm's Eva family, against timm's own forward pass and against loops."""

import math
from functools import partial

import pytest
import timm
import torch
from timm.layers import DropPath, SwiGLUPacked
from tiny import images, tiny_config, tiny_model, total_loss

from ccmim_fast.engine.build import build_step
from ccmim_fast.errors import ConfigError
from ccmim_fast.models.block import ViTBlock
from ccmim_fast.models.encoder import build_encoder, timm_form
from ccmim_fast.models.eva import EvaViTBlock, as_eva, rotary_form
from ccmim_fast.models.parts import ratio
from ccmim_fast.models.scores import AllBlocks, FirstBlock, OneBlock, eq4_of_blocks
from ccmim_fast.models.tokens import embed, encode, folded_projection, rotary_tables, tokens_of, with_prefix
from ccmim_fast.models.watched import watched
from ccmim_fast.optim.optimizer import build_optimizer
from ccmim_fast.ranks.session import Session

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).double(), torch.tensor([0.2, 0.25, 0.3]).double()
ROPE_VIT = "vit_small_patch16_rope_224"
SIZE = {"image_size": (32, 48), "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
# One of each structure that the family has.
ARCHS = {
    "eva02_tiny_patch14_224": "rotations, positions and SwiGLU",
    "eva02_base_patch16_clip_224": "queries, keys and values apart, norms in attention and MLP",
    "eva_giant_patch14_224": "positions alone",
    "eva02_enormous_patch14_clip_224": "norms behind attention and MLP: timm's own block",
    "vit_base_patch16_rope_reg1_gap_256": "a register, no [CLS] of its own",
    "vit_small_patch16_rope_224": "rotations alone, rows and columns exchanged",
    "vit_small_patch16_rope_mixed_ape_224": "learned frequencies of each head, and positions",
    "vit_pe_core_tiny_patch16_384": "a norm before the blocks",
    "vit_pe_lang_large_patch14_448": "no norm behind the blocks",
    "vit_small_patch16_dinov3": "coordinates from -1 to 1, halves rotated, registers",
    "vit_small_plus_patch16_dinov3_qkvb": "SwiGLU, a bias of queries and values",
    "vit_base_patch16_sapiens2": "norms of queries and keys",
}
OF_NEWER_TIMM = pytest.mark.skipif(not timm.is_model("vit_base_patch16_sapiens2"), reason="timm 1.0.31 has Sapiens2")
ARCHS = [pytest.param(arch, marks=OF_NEWER_TIMM if "sapiens2" in arch else ()) for arch in ARCHS]


# In float64, but for timm's tables of rotations, which are float32.
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def randomised(vit):
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return vit


def ours_and_timms(arch, **sizes):
    """Return an encoder and timm's own module with the same weights, in float64, every weight random."""
    torch.manual_seed(0)
    sizes = SIZE | sizes
    ours = randomised(build_encoder(arch, channels=3, **sizes)).double().eval()
    image_size = sizes.pop("image_size")
    if "sapiens2" in arch:
        sizes["num_kv_heads"] = [block.attn.num_kv_heads for block in ours.blocks]
    theirs = timm.create_model(arch, num_classes=0, img_size=image_size, class_token=True, global_pool="token", **sizes)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.double().eval()


def normalised(images_BHWC):
    return ((images_BHWC.double() / 255 - MEAN) / STD).permute(0, 3, 1, 2)


def embedded(vit, pictures):
    return embed(vit, pictures, folded_projection(vit, MEAN, STD)).tokens


@pytest.mark.parametrize("arch", ARCHS)
def test_equals_timm(arch):
    ours, theirs = ours_and_timms(arch)
    pictures = images(2)
    with torch.no_grad():
        close(tokens_of(ours, MEAN, STD)(pictures), theirs.forward_features(normalised(pictures)))


@pytest.mark.parametrize("arch", ARCHS)
def test_some_patches_are_what_timm_computes_where_attention_sees_them_alone(arch):
    """timm has all patches, and a mask of attention; ours has some patches of each image, with their rotations."""
    ours, theirs = ours_and_timms(arch)
    pictures, prefix = images(3), ours.num_prefix_tokens
    ids_BK = torch.stack([torch.randperm(24)[:7] for _ in range(3)])
    seen_BT = torch.zeros(3, prefix + 24, dtype=torch.bool)
    seen_BT[:, :prefix] = True
    seen_BT.scatter_(1, prefix + ids_BK, True)
    x_BLD = embedded(ours, pictures)
    some_BKD = x_BLD.gather(1, ids_BK[..., None].expand(-1, -1, 48))
    with torch.no_grad():
        found, _ = encode(ours, with_prefix(ours, some_BKD), ids_BK)
        alone, _ = encode(ours, with_prefix(ours, some_BKD), ids_BK, cls_only=True)
        seen_BNTT = seen_BT[:, None, None].expand(-1, 1, prefix + 24, -1)
        whole = theirs.forward_features(normalised(pictures), attn_mask=seen_BNTT)
    rows_BK = torch.cat([torch.arange(prefix).expand(3, -1), prefix + ids_BK], dim=1)
    expected = whole.gather(1, rows_BK[..., None].expand(-1, -1, 48))
    close(found, expected)
    close(alone, expected[:, :1])


@pytest.mark.parametrize("half", [True, False])
def test_rotations_by_loops(half):
    """The score of a query of [CLS] and a key: pairs of channels are complex numbers, turned by the patch's angle."""
    arch = "vit_small_patch16_dinov3" if half else "vit_small_patch16_rope_224"
    vit, _ = ours_and_timms(arch)
    block, pictures = vit.blocks[0], images(1)
    ids_BK = torch.tensor([[5, 17, 2]])
    x_BTD = with_prefix(vit, embedded(vit, pictures)[:, ids_BK[0]])
    table_LR = vit.rope.get_embed()
    with torch.no_grad():
        found_BL = block.cls_attention(x_BTD, "logits", rope=table_LR[ids_BK][:, None])
        q_BTNH, k_BTNH, _ = block.project(block.norm1(x_BTD), slice(0, 3))
    for place, patch in enumerate(ids_BK[0].tolist()):
        row, column = divmod(patch, 6)
        logit = 0.0
        for head in range(3):
            q, k = q_BTNH[0, 0, head].tolist(), k_BTNH[0, vit.num_prefix_tokens + place, head].tolist()
            for pair in range(8):
                first, second = (pair, pair + 8) if half else (2 * pair, 2 * pair + 1)
                axis, band = divmod(pair, 4)
                if half:
                    coordinate = 2 * ((row + 0.5) / 4 if axis == 0 else (column + 0.5) / 6) - 1
                    angle = 2 * math.pi * coordinate / 100 ** (band / 4)
                else:
                    angle = (column if axis == 0 else row) / 100 ** (band / 4)
                turned = complex(k[first], k[second]) * complex(math.cos(angle), math.sin(angle))
                logit += q[first] * turned.real + q[second] * turned.imag
        assert found_BL[0, place].item() == pytest.approx(logit / 3 / 4, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if "enormous" not in arch.values[0]])
def test_block_is_timms_where_timm_makes_it(arch):
    """In training with stochastic depth, with timm's masks, and with [CLS]'s attention as it is seen in timm's."""
    ours, theirs = ours_and_timms(arch)
    block, their_block, prefix = ours.blocks[1].train(), theirs.blocks[1].train(), ours.num_prefix_tokens
    assert type(block) is EvaViTBlock
    for one in (block, their_block):
        one.drop_path1, one.drop_path2 = DropPath(0.5), DropPath(0.5)
    x_BTD, rotation = torch.randn(4, prefix + 24, 48, dtype=torch.float64), rotary_tables(ours)[1]
    results = []
    for one in (block, their_block):
        torch.manual_seed(1)
        results.append(one(x_BTD, **rotation))
    torch.testing.assert_close(*results)
    causal = their_block.eval()(x_BTD, is_causal=True, **rotation)
    torch.testing.assert_close(block.eval()(x_BTD, is_causal=True, **rotation), causal)
    found, row_BL = block(x_BTD, reads_cls=True, **rotation)
    expected, expected_BL = watched(their_block, x_BTD, prefix, "softmax", **rotation)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(row_BL, expected_BL)
    for kind in ("logits", "softmax"):
        expected_BL = watched(their_block, x_BTD, prefix, kind, **rotation)[1]
        torch.testing.assert_close(block.cls_attention(x_BTD, kind, **rotation), expected_BL)


@pytest.mark.parametrize("arch", ARCHS)
def test_scores_are_those_that_timms_blocks_show(arch):
    """Of the first block, of one, of each and of all; no vector stands in for keys that are rotated."""
    ours, theirs = ours_and_timms(arch)
    ours.requires_grad_(False)
    x_BLD, prefix = embedded(ours, images(2)), ours.num_prefix_tokens
    x_BTD, total_BL, shown = theirs.norm_pre(with_prefix(ours, x_BLD)), None, []
    for block, rotation in zip(theirs.blocks, rotary_tables(ours)):
        shown.append(watched(block, x_BTD, prefix, "logits", **rotation)[1])
        x_BTD, total_BL = watched(block, x_BTD, prefix, "softmax", total_BL, **rotation)
    close(eq4_of_blocks(ours, x_BLD), shown)
    close(FirstBlock(ours)(ours, x_BLD).softmax(1), shown[0].softmax(1))
    close(OneBlock(ours, block=1)(ours, x_BLD), shown[1])
    close(AllBlocks(ours)(ours, x_BLD), total_BL.log())


METHODS = {
    "bank": {"score": {"source": "bank"}},
    "bank, unseen at random": {"score": {"source": "bank", "unseen": "random"}},
    "first": {"score": {"source": "first"}},
    "block": {"score": {"source": "block", "block": 1}},
    "all": {"score": {"source": "all"}},
    "random": {"mask": {"strategy": "random"}},
    "MAE": {"mask": {"strategy": "random"}, "contrast": {"loss": "none"}},
    "align": {"score": {"source": "all"}, "contrast": {"loss": "align"}},
}


def step(arch, pictures, **sections):
    """Return model, configuration and output of a pass whose loss has gone back to all weights."""
    torch.manual_seed(0)
    model, config = tiny_model(torch.float32, **{"model": {"arch": arch, "depth": 2}} | sections)
    output = model(pictures, torch.arange(len(pictures)), 0)
    total_loss(model, output, pictures, config).total.backward()
    return model, config, output


@pytest.mark.parametrize("arch", ARCHS)
def test_trains_with_a_bank(arch):
    model, _, output = step(arch, images(4), **METHODS["bank"])
    assert output.cls_attention_BL.isfinite().all()
    without = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert without == set()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_ape_224"])
def test_trains_by_every_method(arch, method):
    model, _, output = step(arch, images(4), **METHODS[method])
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.encoder.patch_embed.proj.weight.grad.any()
    if output.logits_BL is not None and method != "bank, unseen at random":
        assert output.logits_BL.std(dim=1).min() > 0


def test_a_patch_at_another_place_has_another_score():
    """The same pixels everywhere: only rotations tell patches apart."""
    pictures = torch.full((1, 32, 48, 3), 100, dtype=torch.uint8)
    _, _, output = step("vit_small_patch16_dinov3", pictures.expand(4, -1, -1, -1), **METHODS["all"])
    assert output.logits_BL.std(dim=1).min() > 1e-4


@pytest.mark.parametrize("arch", ["eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224"])
def test_recomputing_and_reading_change_nothing(arch):
    found = []
    for sections in ({"score": {"source": "all"}}, METHODS["bank"] | {"train": {"recompute": True}}):
        torch.manual_seed(0)
        model, config = tiny_model(model={"arch": arch, "depth": 2}, **sections)
        torch.manual_seed(1)
        pictures = images(4)
        partition = model.divide(model.embed(pictures), torch.arange(4), 0).partition if not found else partition  # noqa: F821
        output = model(pictures, torch.arange(4), 0, partition=partition)
        total_loss(model, output, pictures, config).total.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("key", "value"), [("attention", "plain"), ("recompute", True)])
def test_settings_of_our_blocks_are_refused_for_timms_own(key, value):
    config = tiny_config(model={"arch": "eva02_enormous_patch14_clip_224"}, train={key: value, "device": "cpu"})
    words = rf"train\.{key}={str(value).lower()}: eva02_enormous_patch14_clip_224 has timm's EvaBlockPostNorm"
    with pytest.raises(ConfigError, match=words):
        build_step(config, Session(0, 1, torch.device("cpu")))


def test_learned_frequencies_have_no_decay():
    model, _ = tiny_model(model={"arch": "vit_small_patch16_rope_mixed_224"})
    optimizer = build_optimizer("adamw", model, lr=0.1, weight_decay=0.1, betas=(0.9, 0.95))
    spared = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert id(model.encoder.rope.freqs) in spared


@OF_NEWER_TIMM
def test_coordinates_stay_in_training():
    """Sapiens2 rescales them at random in its own training."""
    vit = build_encoder("vit_base_patch16_sapiens2", channels=3, **SIZE).train()
    first, again = rotary_tables(vit)[0]["rope"], rotary_tables(vit)[0]["rope"]
    assert torch.equal(first, again)
    assert torch.equal(first, rotary_tables(vit.eval())[0]["rope"])


@OF_NEWER_TIMM
@pytest.mark.parametrize("depth", [4, 17, 24])
def test_heads_share_keys_in_the_middle_alone(depth):
    """Sapiens2: eight blocks at each end have keys for every head."""
    sizes = SIZE | {"depth": depth, "num_heads": 4, "embed_dim": 64}
    vit = build_encoder("vit_large_patch16_sapiens2", channels=3, **sizes)
    keys = [block.attn.num_kv_heads for block in vit.blocks]
    assert keys == [4] * min(8, depth) + [2] * max(0, depth - 16) + [4] * max(0, min(8, depth - 8))
    pictures = images(2)
    torch.testing.assert_close(tokens_of(vit.double(), MEAN, STD)(pictures), vit.forward_features(normalised(pictures)))


def test_other_classes_are_refused():
    with pytest.raises(ConfigError, match=r"resnet18 is a ResNet; expected timm's VisionTransformer or Eva"):
        build_encoder("resnet18", channels=3, image_size=(32, 32))
    sizes = SIZE | {"embed_dim": 60, "num_heads": 6}
    with pytest.raises(ConfigError, match=r"model\.embed_dim=60 must be a multiple of 24 \(6 heads\); nearest: 48"):
        build_encoder("vit_small_patch16_rope_224", channels=3, **sizes)


@pytest.mark.parametrize("arch", ["vit_small_patch16_224", *ARCHS])
def test_rotary_positions_alone(arch):
    """An encoder keeps its weights' names but for its positions, and timm's rotations where it has them."""
    torch.manual_seed(0)
    ours = randomised(build_encoder(arch, channels=3, **SIZE, positions="rope")).double().eval()
    sizes = {key: value for key, value in SIZE.items() if key != "image_size"}
    parts = {"registers": 0, "layer_scale": 0.0, "qk_norm": False, "mlp": "own"}
    name, arguments = timm_form(arch, "rope", **parts, **sizes)
    theirs = timm.create_model(name, num_classes=0, img_size=(32, 48), **arguments)
    theirs.load_state_dict(ours.state_dict())
    pictures = images(2)
    with torch.no_grad():
        close(tokens_of(ours, MEAN, STD)(pictures), theirs.double().eval().forward_features(normalised(pictures)))
    own = build_encoder(arch, channels=3, **SIZE).double().eval()
    shapes = {key: value.shape for key, value in own.state_dict().items() if key != "pos_embed"}
    assert shapes == {key: value.shape for key, value in ours.state_dict().items()}
    if getattr(own, "rope", None) is None:
        assert torch.equal(
            rotary_tables(ours)[0]["rope"], rotary_tables(build_encoder(ROPE_VIT, channels=3, **SIZE))[0]["rope"]
        )
        return
    zeros = {} if own.pos_embed is None else {"pos_embed": torch.zeros_like(own.pos_embed)}
    own.load_state_dict(ours.state_dict() | zeros)
    with torch.no_grad():
        close(tokens_of(own, MEAN, STD)(pictures), tokens_of(ours, MEAN, STD)(pictures))


@pytest.mark.parametrize("arch", ["eva02_tiny_patch14_224", "eva_giant_patch14_224", "eva02_enormous_patch14_clip_224"])
def test_trains_with_rotary_positions_alone(arch):
    model, _, _ = step(arch, images(4), model={"arch": arch, "depth": 2, "positions": "rope"}, **METHODS["bank"])
    assert model.encoder.pos_embed is None
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_rotary_form_has_the_very_mlp():
    """480 channels of 176 are not those of 480 / 176, whose product with 176 timm cuts off to 479."""
    own = timm.create_model("vit_tiny_patch16_224", embed_dim=176, num_heads=2, depth=1, mlp_ratio=ratio(480, 176))
    assert own.blocks[0].mlp.fc1.out_features == 480
    name, arguments = rotary_form("vit_tiny_patch16_224", own)
    assert timm.create_model(name, **arguments).blocks[0].mlp.fc1.out_features == 480
    for hidden in range(8, 800, 8):
        half = as_eva({"mlp_layer": SwiGLUPacked, "mlp_ratio": ratio(2 * hidden, 176)})["mlp_ratio"]
        assert (int(176 * half), int(176 * ratio(2 * hidden, 176))) == (hidden, 2 * hidden)


def test_a_plain_block_takes_no_rotations():
    block, x_BTD = build_encoder("vit_small_patch16_224", channels=3, **SIZE).blocks[0], torch.zeros(1, 25, 48)
    with pytest.raises(AssertionError, match="a ViTBlock does not rotate"):
        block(x_BTD, rope=torch.zeros(24, 32))


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("vit_base_patch16_clip_224", "a norm before its blocks"),
        ("vit_small_patch14_reg4_dinov2", None),
        ("vit_medium_patch16_reg4_gap_256", None),
        ("vit_giant_patch14_dinov2", "an MLP other than GELU's"),
        ("beit3_base_patch16_224", "norms "),
        ("vit_base_patch16_xp_224", r"blocks of another kind \(ParallelScalingBlock\)"),
        ("vit_dwee_patch16_reg1_gap_256", r"blocks of another kind \(DiffAttention\)"),
        ("deit_tiny_distilled_patch16_224", "a token of distillation"),
        ("vit_pwee_patch16_reg1_gap_256", "blocks of another kind"),
    ],
)
def test_what_has_no_rotary_form(arch, reason):
    sizes = SIZE | {"depth": 1}
    if reason is None:
        vit = build_encoder(arch, channels=3, **sizes, positions="rope")
        assert vit.num_prefix_tokens == 5
        assert vit.blocks[0].gamma_1 is not None
    else:
        with pytest.raises(ConfigError, match=f"model.positions=rope: {arch} has {reason}"):
            build_encoder(arch, channels=3, **sizes, positions="rope")


@pytest.mark.parametrize("what", ["blocks", "step"])
def test_compiles_whole(what):
    """As torch.compile traces it for a GPU, without a break; here its graph is run as it is."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, _ = tiny_model(torch.float32, model={"arch": "vit_small_patch16_dinov3", "depth": 2}, **METHODS["bank"])
    pictures, ids_B = images(4), torch.arange(4)
    expected = model(pictures, ids_B, 0)
    if what == "step":
        run = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    else:
        compute = torch.compile(ViTBlock.compute, fullgraph=True, backend="eager")
        for block in (*model.encoder.blocks, *model.decoder.blocks):
            block.compute = compute
        run = model
    found = run(pictures, ids_B, 0, partition=expected.partition)
    torch.testing.assert_close(found.pred_BMP, expected.pred_BMP, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.cls_attention_BL, expected.cls_attention_BL, rtol=1e-4, atol=1e-5)
