"""Images of float32: the model, its gradients and its losses are those of bytes, and keep what bytes have not."""

import pytest
import torch
from tiny import images, tiny_config, tiny_model, total_loss

from ccmim_fast.build.model import build_model
from ccmim_fast.models.tokens import centred, embed, folded_projection, tokens_of

IDS = torch.arange(4)


def run(model, config, pictures):
    model.zero_grad()
    output = model(pictures, IDS, 0)
    losses = total_loss(model, output, pictures, config)
    losses.total.backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("target", [{"kind": "pixels"}, {"kind": "pixels", "norm_pix": False}, {"kind": "hog"}])
def test_float32_images_are_bytes_where_they_are_whole(target):
    model, config = tiny_model(target=target)
    pictures = images()
    losses, grads = run(model, config, pictures)
    wide_losses, wide_grads = run(model, config, pictures.float())
    torch.testing.assert_close(wide_losses.total, losses.total)
    assert grads.keys() == wide_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(wide_grads[name], grad, rtol=1e-5, atol=1e-8, msg=name)
    encode = tokens_of(model.encoder, model.mean_C, model.std_C)
    torch.testing.assert_close(encode(pictures.float()), encode(pictures))
    torch.testing.assert_close(model.embed(pictures.float()), model.embed(pictures))


def test_half_precision_keeps_more_than_8_bits():
    """A narrow range far from black, as 16-bit images have: bfloat16 holds 8 bits of a pixel, and 8 of its distance."""
    data = {"mean": (0.5, 0.5, 0.5), "std": (0.002, 0.002, 0.002)}
    model = build_model(tiny_config(data={**data, "image_size": (32, 48)}))
    pictures = 127.5 + 0.5 * torch.randn(4, 32, 48, 3)
    gold = model.double().embed(pictures.double())
    model = model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.embed(pictures)
        naive = embed(model.encoder, pictures, folded_projection(model.encoder, model.mean_C, model.std_C)).tokens
    errors = [(one.double() - gold).abs().max().item() for one in (found, naive)]
    assert errors[0] < 0.05 * errors[1]


def test_bytes_are_not_touched():
    pictures, mean_C = images(), torch.tensor([0.1, 0.2, 0.3])
    same, own_C = centred(pictures, mean_C)
    assert same is pictures
    assert own_C is mean_C
