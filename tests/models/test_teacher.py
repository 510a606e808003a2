"""The teacher sees some of the masked patches: what its pass computes, and what it leaves to the bank."""

import math

import pytest
import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from tiny import images, tiny_config, tiny_model, total_loss

from ccmim_fast.build.model import build_model
from ccmim_fast.models.block import ViTBlock
from ccmim_fast.models.eva import EvaViTBlock
from ccmim_fast.models.tokens import prefix_tokens
from ccmim_kernels.philox import STREAM_TEACHER, keyed_uniform

B, L, M = 4, 24, 18
EIGHT = {"tokens": 0.45}  # of the 18 masked patches: round(8.1)


@pytest.mark.parametrize(("tokens", "seen"), [(1.0, 18), (0.99, 18), (0.45, 8), (1 / 3, 6), (0.08, 1), (1e-9, 1)])
def test_the_share_is_rounded_and_one_patch_at_least(tokens, seen):
    model = build_model(tiny_config(teacher={"tokens": tokens}))
    assert model.sampling["teacher"] == seen


def test_without_a_contrast_there_is_no_draw():
    model = tiny_model(mask={"strategy": "random"}, contrast={"loss": "none"}, teacher=EIGHT)[0]
    partition = model(images(B), torch.arange(B), 0).partition
    assert partition.ids_teacher_BT is partition.ids_masked_BM


ENCODERS = {
    "plain": {},
    "registers": {"arch": "vit_small_patch14_reg4_dinov2"},
    "a token of distillation": {"arch": "deit_tiny_distilled_patch16_224"},
    "learned positions": {"positions": "learned"},
    "blocks side by side": {"arch": "vit_small_patch16_18x2_224"},
    "rotary positions": {"positions": "rope"},
    "rotary positions and registers": {"positions": "rope", "registers": 2},
    "rotary and added positions": {"arch": "vit_small_patch16_rope_ape_224"},
    "learned frequencies": {"arch": "vit_small_patch16_rope_mixed_ape_224"},
}


TIMMS = {ViTBlock: Block, EvaViTBlock: EvaBlock}


def by_timm(model, pictures, ids_BT):
    """hM of one image after the other, its tokens through timm's blocks; rotations by timm's own table."""
    vit, found = model.encoder, []
    for x_LD, ids_T in zip(model.embed(pictures), ids_BT):
        x_1TD = vit.norm_pre(torch.cat([prefix_tokens(vit), x_LD[ids_T]])[None])
        table = vit.rope.get_embed() if getattr(vit, "rope", None) is not None else None
        for index, block in enumerate(vit.blocks):
            of_block = table if table is None or table.ndim == 2 else table[index][None]
            options = {} if table is None else {"rope": of_block[..., ids_T, :]}
            x_1TD = TIMMS.get(type(block), type(block)).forward(block, x_1TD, **options)
        found.append(vit.norm(x_1TD)[0, 0])
    return model.projector(torch.stack(found))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_its_vector_is_that_of_the_patches_it_saw(encoder):
    source = {"source": "bank"}
    model = tiny_model(model=ENCODERS[encoder], score=source, teacher=EIGHT)[0].eval()
    pictures = images(B)
    with torch.no_grad():
        output = model(pictures, torch.arange(B), 3)
        seen_BT = output.partition.ids_teacher_BT
        assert seen_BT.shape == (B, 8)
        torch.testing.assert_close(output.masked_BE, by_timm(model, pictures, seen_BT))


@pytest.mark.parametrize("strategy", ["random", "block", "importance", "importance_sampling"])
@pytest.mark.parametrize("contrast", ["nce", "align", "moco"])
def test_steps_with_every_division_and_loss(strategy, contrast):
    """The visible set and its prediction are as with the whole teacher, the draw is keyed by sample and epoch."""
    sections = {"mask": {"strategy": strategy, "block_min": 4}, "contrast": {"loss": contrast}}
    results = []
    for tokens in (1.0, EIGHT["tokens"]):
        torch.manual_seed(1)
        model, config = tiny_model(score={"source": "first"}, teacher={"tokens": tokens}, **sections)
        torch.manual_seed(2)
        pictures = images(B)
        output = model(pictures, torch.arange(B), 5)
        losses = total_loss(model, output, pictures, config)
        losses.total.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        results.append((output, losses))
    (whole, whole_losses), (part, part_losses) = results
    assert torch.equal(part.pred_BMP, whole.pred_BMP)
    assert torch.equal(part_losses.recons, whole_losses.recons)
    assert not torch.equal(part.masked_BE, whole.masked_BE)
    noise_BL = keyed_uniform(0, 5, torch.arange(B), L, STREAM_TEACHER).masked_fill(~part.partition.mask_BL, -1)
    assert torch.equal(part.partition.ids_teacher_BT, noise_BL.topk(8).indices.sort().values)


@pytest.mark.parametrize("source", ["bank", "first", "block", "all"])
def test_every_source_of_scores(source):
    model, config = tiny_model(score={"source": source, "block": 1}, teacher=EIGHT)
    output = model(images(B), torch.arange(B), 0)
    assert total_loss(model, output, images(B), config).total.isfinite()
    assert output.partition.ids_teacher_BT.shape == (B, 8)
    assert (output.attended_BL is None) == (source != "bank")


def test_the_bank_is_told_which_patches_were_in_a_pass():
    """Attention of the patches seen, times their number, by whole maps; 0 and not attended: the other masked ones."""
    model = tiny_model(score={"source": "bank"}, teacher=EIGHT)[0].eval()
    pictures = images(B)
    with torch.no_grad():
        output = model(pictures, torch.arange(B), 0)
        embedded = model.embed(pictures)
        for b in range(B):
            sets = output.partition.ids_visible_BK[b], output.partition.ids_teacher_BT[b]
            both = torch.cat(sets)
            assert output.attended_BL[b].nonzero()[:, 0].tolist() == both.sort().values.tolist()
            assert output.cls_attention_BL[b][~output.attended_BL[b]].tolist() == [0.0] * (M - 8)
            for ids in sets:
                x, rows = torch.cat([prefix_tokens(model.encoder), embedded[b, ids]])[None], []
                for block in model.encoder.blocks:
                    q, k, _ = block.attn.qkv(block.norm1(x)).view(1, len(ids) + 1, 3, 3, 16).permute(2, 0, 3, 1, 4)
                    rows.append((q @ k.transpose(-1, -2) / math.sqrt(16)).softmax(-1).mean(1)[0, 0, 1:])
                    x = block(x)
                expected = (torch.stack(rows).mean(0) * len(ids)).log()
                torch.testing.assert_close(output.cls_attention_BL[b, ids].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_teacher_that_sees_all_is_the_one_without_a_share():
    model = tiny_model(score={"source": "bank"})[0]
    output = model(images(B), torch.arange(B), 0)
    assert output.partition.ids_teacher_BT is output.partition.ids_masked_BM
    assert output.attended_BL is None


def test_a_given_division_says_what_the_teacher_sees():
    model = tiny_model(score={"source": "bank"}, teacher=EIGHT)[0].eval()
    pictures, ids = images(B), torch.arange(B)
    first = model(pictures, ids, 0)
    again = model(pictures, ids, 7, partition=first.partition)
    assert torch.equal(again.masked_BE, first.masked_BE)
    assert torch.equal(again.cls_attention_BL, first.cls_attention_BL)
