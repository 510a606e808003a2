"""Published checkpoints: an MAE written here from its paper, in its flat key layout, must give the same loss."""

import argparse

import pytest
import torch
from timm.models.vision_transformer import Block
from tiny import images, tiny_model, total_loss
from torch import nn

from ccmim_fast.checkpoints.convert import from_flat, to_flat, to_timm
from ccmim_fast.checkpoints.published import read_weights
from ccmim_fast.errors import CheckpointError
from ccmim_fast.models.encoder import sincos_positions
from ccmim_kernels import patchify


class FlatMAE(nn.Module):
    """MAE with its published key layout: everything at the top level, full decoder, un-folded normalisation."""

    def __init__(self, grid, patch, width, depth, heads, decoder_width, decoder_depth, decoder_heads, projector=None):
        super().__init__()
        patches = grid[0] * grid[1]
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_positions(width, grid, 1)[None], requires_grad=False)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_width))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, patches + 1, decoder_width), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, decoder_heads, qkv_bias=True) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_width, patch * patch * 3)
        for block in (*self.blocks, *self.decoder_blocks):
            block.norm1.eps = block.norm2.eps = 1e-6
        if projector is not None:
            self.projector = projector
        self.patch = patch

    def loss(self, x_BCHW, visible_ids, masked_ids):
        """Mean over masked patches of the mean squared error against per-patch normalised pixels, image by image."""
        losses = []
        for image, visible, masked in zip(x_BCHW, visible_ids.tolist(), masked_ids.tolist()):
            x = self.patch_embed.proj(image[None]).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
            x = torch.cat([self.cls_token + self.pos_embed[:, :1], x[:, visible]], dim=1)
            for block in self.blocks:
                x = block(x)
            x = self.decoder_embed(self.norm(x))
            full = self.mask_token.repeat(1, self.decoder_pos_embed.shape[1], 1)
            full[:, 0] = x[:, 0]
            for k, patch in enumerate(visible):
                full[:, 1 + patch] = x[:, 1 + k]
            full = full + self.decoder_pos_embed
            for block in self.decoder_blocks:
                full = block(full)
            pred = self.decoder_pred(self.decoder_norm(full))[0, 1:]
            target = patchify(image.permute(1, 2, 0)[None], self.patch)[0]
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
            losses.append(((pred - target) ** 2).mean(-1)[masked].mean())
        return torch.stack(losses).mean()


def made_pair(contrast="none"):
    model, config = tiny_model(contrast={"loss": contrast}, mask={"strategy": "random"})
    projector = model.projector if contrast != "none" else None
    mae = FlatMAE((4, 6), 8, 48, 3, 3, 32, 2, 4, projector).double()
    return mae, model, config


def test_same_loss_and_gradients_on_the_same_mask():
    mae, model, config = made_pair()
    pictures = images()
    part = model(pictures, torch.arange(4), 0).partition
    model.load_state_dict(from_flat(mae.state_dict()))
    ours = total_loss(model, model(pictures, torch.arange(4), 0, partition=part), pictures, config).recons
    mean, std = model.mean_C, model.std_C
    x = ((pictures.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    theirs = mae.loss(x, part.ids_visible_BK, part.ids_masked_BM)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    ours.backward()
    theirs.backward()
    found = to_flat({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    expected = {name: weight.grad for name, weight in mae.named_parameters() if weight.requires_grad}
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_authors_projector_loads_strictly():
    mae, model, _ = made_pair("nce")
    flat = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in mae.state_dict().items()}
    assert {k for k in flat if k.startswith("projector.")} >= {
        "projector.0.weight",
        "projector.1.bias",
        "projector.4.running_var",
    }
    model.load_state_dict(from_flat(flat))
    for name, value in flat.items():
        assert torch.equal(model.state_dict()[next(iter(from_flat({name: value})))], value)


def test_round_trip():
    _, model, _ = made_pair("nce")
    ours = model.state_dict()
    assert from_flat(to_flat(ours)).keys() == ours.keys()


def test_to_timm_loads_strictly():
    import timm

    _, model, _ = made_pair()
    target = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=(32, 48), patch_size=8, embed_dim=48, depth=3, num_heads=3
    )
    target.load_state_dict(to_timm(model.state_dict()), strict=True)
    assert torch.equal(target.blocks[1].attn.qkv.weight, model.encoder.blocks[1].attn.qkv.weight.float())


def test_file_with_its_command_line(tmp_path):
    path = tmp_path / "mae.pth"
    weights = {"cls_token": torch.zeros(1, 1, 1), "patch_embed.proj.weight": torch.zeros(1, 3, 2, 2)}
    torch.save({"model": weights, "args": argparse.Namespace(lr=1.0)}, path)
    assert read_weights(str(path)).tensors.keys() == {f"encoder.{name}" for name in weights}


class Hostile:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_hostile_file_is_refused(tmp_path, capsys):
    path = tmp_path / "bad.pth"
    torch.save({"model": Hostile()}, path)
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        read_weights(str(path))
    assert "this must not run" not in capsys.readouterr().out
