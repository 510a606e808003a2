"""Activation checkpointing: the same gradients from fewer saved bytes."""

import torch
from tiny import images, tiny_model, total_loss


def trained(recompute):
    torch.manual_seed(0)
    model, config = tiny_model(train={"recompute": recompute}, model={"depth": 6})
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t)
    pictures = images()
    with hooks:
        output = model(pictures, torch.arange(4), 0)
        loss = total_loss(model, output, pictures, config).total
    loss.backward()
    return sum(saved), loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_same_gradients_from_less_memory():
    bytes_of_all, loss, gradients = trained(recompute=False)
    bytes_of_few, again, ours = trained(recompute=True)
    assert bytes_of_few < 0.5 * bytes_of_all
    torch.testing.assert_close(again, loss)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient)
