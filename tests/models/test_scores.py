"""Eq. 4 and the all-block scores against loops that read the weights themselves."""

import math
from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block, ParallelThingsBlock
from tiny import images, tiny_model

from ccmim_fast.build.model import build_score_source
from ccmim_fast.errors import ConfigError
from ccmim_fast.models.encoder import build_encoder
from ccmim_fast.models.scores import AllBlocks, FirstBlock, OneBlock, can_fold, eq4_of_blocks
from ccmim_fast.models.tokens import embed, folded_projection, prefix_tokens
from ccmim_fast.models.watched import cls_attention, watched
from ccmim_fast.profile.meter import flop_counter
from ccmim_fast.registry import SCORE_SOURCES


def eq4_by_loops(block, tokens_TD):
    """softmax_i( mean_h( q_0^h . k_i^h / sqrt(H) ) ) for the tokens of one image, [CLS] first."""
    normed = block.norm1(tokens_TD)
    heads, width = block.attn.num_heads, tokens_TD.shape[1]
    head_dim = width // heads
    weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
    q0 = weight[:width] @ normed[0] + bias[:width]
    logits = []
    for token in normed[1:]:
        k = weight[width : 2 * width] @ token + bias[width : 2 * width]
        per_head = [
            sum(q0[h * head_dim + d] * k[h * head_dim + d] for d in range(head_dim)) / math.sqrt(head_dim)
            for h in range(heads)
        ]
        logits.append(sum(per_head) / heads)
    return torch.stack(logits).softmax(0)


@pytest.fixture
def embedded():
    model, _ = tiny_model()
    model.requires_grad_(False)
    x = model.embed(images(2))
    tokens = torch.cat([prefix_tokens(model.encoder).expand(2, -1, -1), x], dim=1)
    return model.encoder, x, tokens


@pytest.mark.parametrize("heads", [1, 3, 6])
def test_first_block_folded_equals_loops(heads):
    model, _ = tiny_model(model={"num_heads": heads})
    vit = model.encoder.requires_grad_(False)
    pictures = images(2)
    x = model.embed(pictures)
    tokens = torch.cat([prefix_tokens(vit).expand(2, -1, -1), x], dim=1)
    assert can_fold(vit)
    source = FirstBlock(vit)
    logits = source(vit, x)
    # Those that are computed where tokens are embedded are the same, and are not computed again.
    projection = folded_projection(vit, model.mean_C, model.std_C)
    embedded = embed(vit, pictures, projection, source.direction(vit))
    assert torch.equal(embedded.tokens, x)
    assert torch.equal(embedded.logits, logits)
    assert source(vit, x, folded_BL=embedded.logits) is embedded.logits
    for b in range(2):
        torch.testing.assert_close(logits[b].softmax(0), eq4_by_loops(vit.blocks[0], tokens[b]))


@pytest.mark.parametrize("block", [0, 1, 2])
def test_one_block_equals_loops(embedded, block):
    vit, x, tokens = embedded
    logits = OneBlock(vit, block=block)(vit, x)
    for earlier in vit.blocks[:block]:
        tokens = earlier(tokens)
    for b in range(2):
        torch.testing.assert_close(logits[b].softmax(0), eq4_by_loops(vit.blocks[block], tokens[b]))


def test_all_blocks_in_one_pass_are_those_one_by_one(embedded):
    vit, x, _ = embedded
    found = eq4_of_blocks(vit, x)
    assert len(found) == len(vit.blocks)
    for block, logits in enumerate(found):
        assert torch.equal(logits, OneBlock(vit, block=block)(vit, x))


def cls_rows_by_full_attention(vit, tokens):
    """Per block, the mean over heads of the [CLS] row of the whole attention map, patches only: list of [B, L]."""
    rows = []
    for block in vit.blocks:
        normed = block.norm1(tokens)
        B, T, D = normed.shape
        heads = block.attn.num_heads
        q, k, _ = block.attn.qkv(normed).reshape(B, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(D // heads)).softmax(-1)
        rows.append(attention.mean(1)[:, 0, 1:])
        tokens = block(tokens)
    return rows


def test_all_blocks_renormalised(embedded):
    vit, x, tokens = embedded
    mean = sum(cls_rows_by_full_attention(vit, tokens)) / len(vit.blocks)
    logits = AllBlocks(vit)(vit, x)
    torch.testing.assert_close(logits.softmax(1), mean / mean.sum(1, keepdim=True))


def test_all_blocks_softmax_again_as_in_the_authors_code(embedded):
    vit, x, tokens = embedded
    total = sum(cls_rows_by_full_attention(vit, tokens))
    logits = AllBlocks(vit, normalise="softmax")(vit, x)
    torch.testing.assert_close(logits.softmax(1), total.softmax(1))


def test_models_that_cannot_be_folded_take_the_general_way():
    vit = build_encoder("vit_base_patch16_clip_224", image_size=(32, 32), channels=3, depth=2)
    assert not can_fold(vit)
    x = torch.randn(2, 4, vit.embed_dim)
    out = FirstBlock(vit)(vit, x)
    assert FirstBlock(vit).direction(vit) is None
    assert torch.equal(out, OneBlock(vit, block=0)(vit, x))


@pytest.mark.parametrize("name", SCORE_SOURCES)
def test_scores_have_no_gradient(name, embedded):
    vit, x, _ = embedded
    vit.requires_grad_(True)
    _, config = tiny_model(score={"source": name, "block": 1})
    source = build_score_source(config, vit)
    assert not source(vit, x.clone().requires_grad_()).requires_grad
    direction = source.direction(vit)
    assert direction is None or not direction.requires_grad


@pytest.mark.parametrize("name", SCORE_SOURCES)
def test_every_source_is_registered_with_its_cost(name):
    """Each builds from the settings, scores what enters, and costs what the registry says (torch's own count)."""
    model, config = tiny_model(score={"source": name, "block": 1})
    vit, x = model.encoder, torch.randn(1, 24, 48, dtype=torch.float64)
    source = build_score_source(config, vit)
    with flop_counter() as counter:
        source(vit, x)
    assert source.read_blocks == (3 if SCORE_SOURCES[name].has_bank else 0)
    counted = counter.get_total_flops()
    if SCORE_SOURCES[name].runs_blocks:  # a row of [CLS] against all keys is no product that torch counts
        assert counted == pytest.approx(SCORE_SOURCES[name].flops(24, 48, 3, 1), rel=0.05)
    else:
        assert counted <= SCORE_SOURCES[name].flops(24, 48, 3, 1) * 4  # the fold itself is once a batch
    assert SCORE_SOURCES[name].label


def test_errors():
    model, _ = tiny_model()
    with pytest.raises(ConfigError, match=r"score.block=3 must be in 0\.\.2"):
        OneBlock(model.encoder, block=3)


class _Nothing(torch.nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("kind", ["logits", "softmax"])
def test_a_block_of_another_class_is_watched(kind):
    ours = tiny_model()[0].encoder.blocks[1].requires_grad_(False)
    theirs = Block(48, 3, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)).double()
    theirs.load_state_dict(ours.state_dict())
    x, total = torch.randn(2, 9, 48, dtype=torch.float64), torch.rand(2, 8, dtype=torch.float64)
    expected = ours.cls_attention(x, kind, total)
    torch.testing.assert_close(cls_attention(theirs, x, 1, kind, total), expected, rtol=1e-12, atol=1e-12)
    if kind == "softmax":
        out, row = watched(theirs, x, 1, kind, total)
        torch.testing.assert_close(row, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out, ours(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ConfigError, match=r"_Nothing has no attention map; use mask\.strategy=random"):
        cls_attention(_Nothing(), x, 1, kind)


def test_attentions_side_by_side_are_averaged():
    block = ParallelThingsBlock(48, 3, num_parallel=2).double().requires_grad_(False)
    x, rows = torch.randn(1, 7, 48, dtype=torch.float64), []
    for part in block.attns:
        qkv = part.attn.qkv(part.norm(x))[0].reshape(7, 3, 3, 16)
        rows.append(torch.einsum("nd,tnd->nt", qkv[0, 0], qkv[:, 1]).div(4).softmax(-1).mean(0)[1:])
    torch.testing.assert_close(cls_attention(block, x, 1, "softmax")[0], torch.stack(rows).mean(0))


@pytest.mark.parametrize("arch", ["flexivit_small", "deit3_small_patch16_224", "vit_base_patch16_xp_224"])
@pytest.mark.parametrize("source", SCORE_SOURCES)
def test_flops_of_architectures_are_counted(arch, source):
    """Their [CLS] has no position of its own, or they have other blocks: what counts FLOPs took them amiss."""
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model, _ = tiny_model(torch.float32, model={"arch": arch, **sizes}, score={"source": source})
    with flop_counter() as counter:
        found = model(images(2), torch.arange(2), 0)
    assert found.logits_BL.isfinite().all()
    assert found.logits_BL.std() > 0
    assert counter.get_total_flops() > 0
