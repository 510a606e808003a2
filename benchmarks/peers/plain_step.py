"""What the peers' steps have in common: forward, backward and AdamW, and the forms that such a step can be run in."""

# B batch, H height, W width, C channels

import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch
from contenders import LR
from torch import Tensor, nn

from ccmim_fast.config.schema import DataConfig, OptimConfig
from ccmim_fast.engine.build import keep_freed_memory
from ccmim_fast.models.precision import choose_precision
from ccmim_fast.optim.optimizer import build_optimizer


def forms(precision: str) -> dict[str, tuple[str, ...]]:
    """Return what `throughput.py` may choose for a peer: keyword arguments, each with its values, the default first.

    weights: the products' operands in bf16 are cast from fp32 by autocast (`fp32`), or the whole model is in bf16 and
        AdamW updates an fp32 copy of it (`bf16`).
    attention: torch's fused kernel (`sdpa`), or two products and a softmax (`eager`), which is the peer's to set.
    layout: of images and of the patch projection's weight in memory.
    compile: nothing (`off`), or the model's forward and backward pass by torch.compile (`model`).
    """
    return {
        **({"weights": ("fp32", "bf16")} if precision == "bf16" else {}),
        "attention": ("sdpa", "eager"),
        "layout": ("channels_first", "channels_last"),
        "compile": ("off", "model"),
    }


def normalised(images_BHWC: Tensor) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] with ImageNet's mean and deviation, as the peers' loaders yield them.

    Done once, outside of the clock: a loader's workers would do it.
    """
    mean_C, std_C = (torch.tensor(values, device=images_BHWC.device) for values in (DataConfig.mean, DataConfig.std))
    return ((images_BHWC / 255 - mean_C) / std_C).permute(0, 3, 1, 2).contiguous()


def plain_step(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    images_BHWC: Tensor,
    precision: str,
    *,
    weights: str = "fp32",
    layout: str = "channels_first",
    compile: str = "off",
) -> Callable[[], Tensor]:
    """Return one training step of `model`: `loss_of(model, images)`, backward, fused AdamW, gradients zeroed.

    Args:
        model: on a CPU, its weights in fp32; its parameters are what is trained, whatever `weights` are computed with.
        loss_of: a scalar, of images [B, C, H, W].
        images_BHWC: uint8, on the device to train on.
        weights, layout, compile: see `forms`.
    """
    device = images_BHWC.device
    if device.type == "cpu":
        keep_freed_memory()  # as the trainer does
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = model.to(device, memory_format=memory_format).train()
    images_BCHW = normalised(images_BHWC).contiguous(memory_format=memory_format)
    chosen = choose_precision(precision, device)
    optimizer = build_optimizer("adamw", model, lr=LR, weight_decay=OptimConfig.weight_decay, betas=OptimConfig.betas)
    scaler = torch.amp.GradScaler(device.type, enabled=chosen.scaled)
    copied = CopiedWeights(model, chosen.dtype) if weights == "bf16" else None
    context = nullcontext if copied else lambda: chosen.autocast(device)
    if copied:
        model, images_BCHW = copied.model, images_BCHW.to(chosen.dtype)
    if compile == "model":
        model.compile(dynamic=False)

    def step() -> Tensor:
        with context():
            loss = loss_of(model, images_BCHW)
        scaler.scale(loss).backward()
        if copied:
            copied.take_gradients()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if copied:
            copied.take_weights()
        return loss.detach()

    return step


class CopiedWeights:
    """A model in `dtype` that computes losses and gradients, beside its own in fp32, which the optimizer updates."""

    def __init__(self, own: nn.Module, dtype: torch.dtype):
        self.model = copy.deepcopy(own).to(dtype)
        pairs = zip(own.parameters(), self.model.parameters(), strict=True)
        self._own, self._copies = zip(*((one, other) for one, other in pairs if one.requires_grad), strict=True)

    def take_gradients(self) -> None:
        """Move the gradients from the copy to the fp32 weights."""
        for own, copied in zip(self._own, self._copies, strict=True):
            own.grad = None if copied.grad is None else copied.grad.to(own.dtype)
            copied.grad = None

    @torch.no_grad()
    def take_weights(self) -> None:
        """Round the updated weights to the copy."""
        torch._foreach_copy_(self._copies, self._own)
