"""What the two passes give a score bank, and what they take from it."""

import math

import pytest
import torch
from naive import without_in_model
from tiny import images, tiny_model, total_loss

from ccmim_fast.errors import ConfigError
from ccmim_fast.models.scores import OneBlock, PriorScores
from ccmim_fast.models.tokens import encode

B, L, K = 3, 24, 6


def bank_model(score=(), without=(), **sections):
    model = tiny_model(score={"source": "bank", **dict(score)}, **sections)[0].eval()
    return without_in_model(model, without) if without else model


def shares_by_full_attention(vit, tokens_BTD, last):
    """log(patches * mean over the last blocks and all heads of [CLS]'s softmaxed row), from whole attention maps."""
    rows = []
    for block in vit.blocks:
        normed = block.norm1(tokens_BTD)
        b, t, d = normed.shape
        heads = block.attn.num_heads
        q, k, _ = block.attn.qkv(normed).reshape(b, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        rows.append((q @ k.transpose(-1, -2) / math.sqrt(d // heads)).softmax(-1).mean(1)[:, 0, 1:])
        tokens_BTD = block(tokens_BTD)
    mean = torch.stack(rows[-last:]).mean(0)
    return (mean * mean.shape[1]).log()


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
@pytest.mark.parametrize("cls_only", [True, False])
def test_shares_are_those_of_both_passes(blocks, cls_only):
    model = bank_model({"blocks": blocks}, without=() if cls_only else ("cls_only",))
    pictures, ids = images(B), torch.arange(B)
    output = model(pictures, ids, 0)
    divided = model.divide(model.embed(pictures), ids, 0)
    assert torch.equal(divided.partition.mask_BL, output.partition.mask_BL)
    expected = torch.empty(B, L, dtype=torch.float64)
    for tokens, where in ((divided.visible, ~output.partition.mask_BL), (divided.masked, output.partition.mask_BL)):
        expected[where] = shares_by_full_attention(model.encoder, tokens, blocks or 3).flatten()
    assert not output.cls_attention_BL.requires_grad
    torch.testing.assert_close(output.cls_attention_BL.double(), expected, rtol=1e-6, atol=1e-6)


def test_reading_changes_neither_losses_nor_gradients():
    partition, pictures = bank_model()(images(B), torch.arange(B), 0).partition, images(B)
    found = []
    for source in ("all", "bank"):
        torch.manual_seed(0)
        model, config = tiny_model(score={"source": source})
        output = model(pictures, torch.arange(B), 0, partition=partition)
        losses = total_loss(model, output, pictures, config)
        losses.total.backward()
        found.append({"total": losses.total} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected)


def test_known_scores_decide_what_is_masked():
    model = bank_model(mask={"strategy": "importance"})
    scores = torch.randn(B, L)
    output = model(images(B), torch.arange(B), 0, prior=PriorScores(scores, torch.ones(B, L)))
    assert torch.equal(output.partition.mask_BL.nonzero()[:, 1].view(B, -1), scores.topk(L - K).indices.sort().values)
    assert torch.equal(output.logits_BL, scores)


@pytest.mark.parametrize("fold", [True, False])
def test_unknown_patches_are_scored_by_the_first_block_where_asked(fold):
    model = bank_model({"unseen": "first"}, without=() if fold else ("fold_score",))
    pictures = images(B)
    scores, share = torch.randn(B, L).double(), torch.rand(B, L).double()
    output = model(pictures, torch.arange(B), 0, prior=PriorScores(scores, share))
    reference = OneBlock(model.encoder, block=0)(model.encoder, model.embed(pictures)).softmax(1)
    expected = scores + (1 - share) * (reference * L).log()
    torch.testing.assert_close(output.logits_BL.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_a_bank_at_hand_nothing_is_known():
    model = bank_model()
    nothing = PriorScores(torch.zeros(B, L), torch.zeros(B, L))
    pictures, ids = images(B), torch.arange(B)
    assert torch.equal(
        model(pictures, ids, 4).partition.mask_BL, model(pictures, ids, 4, prior=nothing).partition.mask_BL
    )


def test_recomputed_in_the_backward_pass():
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model, config = tiny_model(score={"source": "bank"}, train={"recompute": recompute})
        pictures = images(B)
        output = model(pictures, torch.arange(B), 0)
        total_loss(model, output, pictures, config).total.backward()
        results.append((output.cls_attention_BL, model.encoder.blocks[0].attn.qkv.weight.grad))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)


def test_attention_that_rounds_to_zero_is_finite():
    model = bank_model()
    with torch.no_grad():
        for block in model.encoder.blocks:
            block.attn.qkv.weight.mul_(1e4)
    output = model.float()(images(B), torch.arange(B), 0)
    assert output.cls_attention_BL.isfinite().all()
    assert float(output.cls_attention_BL.min()) < -50


def test_the_encoders_tokens_are_the_same():
    model = bank_model()
    tokens = torch.randn(B, 1 + K, 48, dtype=torch.float64)
    encoded, _ = model._encode(tokens, None)
    torch.testing.assert_close(encoded, encode(model.encoder, tokens)[0])
    cls, _ = model._encode(tokens, None, cls_only=True)
    torch.testing.assert_close(cls, encoded[:, :1])


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ConfigError, match=r"score\.source: a bank reads both passes"):
        bank_model(contrast={"loss": "none"})
    with pytest.raises(ConfigError, match=r"score\.blocks=4 must be in 0\.\.3"):
        bank_model({"blocks": 4})
    assert not bank_model(contrast={"loss": "none"}, mask={"strategy": "random"}).banked
