"""Ranks that exchange rows: their gradients, and who waits for whom."""

import torch
import torch.distributed as dist
from tiny import images, tiny_model, total_loss

EACH = 4  # images of a rank
RANKS = 2
PATIENCE = 60  # seconds; a rank that waits in vain fails


def gradients(rank, world_size, contrast, compiled=False):
    """Of the mean over ranks of all losses: by each weight, and by this rank's hV (times the world size)."""
    torch.manual_seed(0)
    model, config = tiny_model(contrast={"loss": contrast, "weight": 1.0})
    own = slice(rank * EACH, (rank + 1) * EACH) if world_size > 1 else slice(None)
    pictures, ids = images(RANKS * EACH)[own], torch.arange(RANKS * EACH)[own]

    def losses():
        output = model(pictures, ids, 0)
        return output, total_loss(model, output, pictures, config).total

    output, loss = (torch.compile(losses, backend="aot_eager") if compiled else losses)()
    output.visible_BE.retain_grad()
    loss.backward()
    found = {name: weight.grad / world_size for name, weight in model.named_parameters() if weight.requires_grad}
    for grad in found.values():
        if world_size > 1:
            dist.all_reduce(grad)
    return found | {"loss": loss.detach(), "visible": output.visible_BE.grad}


def gradients_of_rank(rank, world_size, folder, contrasts):
    for contrast in contrasts:
        torch.save(gradients(rank, world_size, contrast), folder / f"{contrast}_{rank}.pt")


def wait_for_each_other(rank, world_size, forward, backward):
    """The second rank sends nothing until the first is past its decoder, forward and backward."""
    torch.manual_seed(0)
    model, config = tiny_model(heads={"sync_bn": False})
    pictures = images(EACH)

    def wait(event):
        assert event.wait(PATIENCE), "the other rank waits before it computes"

    if rank == 0:
        model.decoder.register_forward_hook(lambda *_: forward.set())
        model.decoder.register_full_backward_hook(lambda *_: backward.set())
    else:
        model.projector.register_forward_hook(lambda *_: wait(forward))
    output = model(pictures, torch.arange(EACH), 0)
    if rank == 1:
        output.gathered_NE.register_hook(lambda _: wait(backward))
    total_loss(model, output, pictures, config).total.backward()
