"""What each op is called with in a measurement: made inputs of real sizes, the op, and which inputs have a gradient."""

# B batch, N all ranks' rows, L patches, K visible, M masked, P prefix tokens, D width, H head dim, E embedding dim

from collections.abc import Callable
from typing import NamedTuple

import torch
from floors import Size
from torch import Tensor

import ccmim_kernels as ops

_TAU = 0.2  # the presets' temperature
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as in MAE


class Case(NamedTuple):
    """One op at one size.

    Attributes:
        call: `call(*inputs, kernels=...)` gives the op's outputs, the differentiable one first.
        inputs: tensors.
        leaves: those of the inputs that receive a gradient; none: the op has no backward.
    """

    call: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...] = ()


def made(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)


def _grid(s: Size) -> tuple[int, int]:
    side = s.image // s.patch
    return side, side


def _ids(s: Size, device: torch.device) -> ops.Partition:
    ids_B = torch.arange(s.batch, device=device)
    return ops.sample_partition(
        None, ids_B, keep=s.keep, grid=_grid(s), seed=0, epoch=0, strategy="random", kernels="reference"
    )


def sample_partition(s: Size, device: torch.device) -> Case:
    where = {"keep": s.keep, "grid": _grid(s), "seed": 0, "epoch": 0}

    def call(logits_BL, ids_B, *, kernels):
        return tuple(ops.sample_partition(logits_BL, ids_B, **where, kernels=kernels))

    return Case(call, (made(s.batch, s.patches, device=device), torch.arange(s.batch, device=device)))


def divide_tokens(s: Size, device: torch.device) -> Case:
    where = {"keep": s.keep, "grid": _grid(s), "seed": 0, "epoch": 0}

    def call(tokens_BLD, prefix_PD, ids_B, direction_D, *, kernels):
        out = ops.divide_tokens(tokens_BLD, prefix_PD, ids_B, direction_D=direction_D, **where, kernels=kernels)
        return out.visible, out.masked, *out.partition, out.logits

    tokens_BLD = made(s.batch, s.patches, s.width, device=device, dtype=torch.bfloat16, grad=True)
    prefix_PD = made(s.prefix, s.width, device=device, grad=True)
    ids_B = torch.arange(s.batch, device=device)
    direction_D = made(s.width, device=device) / s.width**0.5
    return Case(call, (tokens_BLD, prefix_PD, ids_B, direction_D), (tokens_BLD, prefix_PD))


def cls_row(s: Size, device: torch.device) -> Case:
    if s.width % s.head_dim:
        raise ValueError(f"width={s.width} must be a multiple of {s.head_dim}")

    def call(q_BNH, k_BTNH, *, kernels):
        return (ops.cls_row(q_BNH, k_BTNH, prefix=s.prefix, kind="softmax", scale=s.head_dim**-0.5, kernels=kernels),)

    heads = s.width // s.head_dim
    q_BNH = made(s.batch, heads, s.head_dim, device=device, dtype=torch.bfloat16)
    k_BTNH = made(s.batch, s.prefix + s.patches, heads, s.head_dim, device=device, dtype=torch.bfloat16)
    return Case(call, (q_BNH, k_BTNH))


def gather_tokens(s: Size, device: torch.device) -> Case:
    """Both sets, as the model gathers them: the masked one without gradient."""

    def call(tokens_BLD, visible_BK, masked_BM, prefix_PD, *, kernels):
        visible = ops.gather_tokens(tokens_BLD, visible_BK, prefix_PD, kernels=kernels)
        masked = ops.gather_tokens(tokens_BLD.detach(), masked_BM, prefix_PD.detach(), kernels=kernels)
        return visible, masked

    tokens_BLD = made(s.batch, s.patches, s.width, device=device, dtype=torch.bfloat16, grad=True)
    prefix_PD = made(s.prefix, s.width, device=device, grad=True)
    visible_BK, masked_BM, *_ = (ids.contiguous() for ids in _ids(s, device))
    return Case(call, (tokens_BLD, visible_BK, masked_BM, prefix_PD), (tokens_BLD, prefix_PD))


def restore_tokens(s: Size, device: torch.device) -> Case:
    def call(*inputs, kernels):
        return (ops.restore_tokens(*inputs, kernels=kernels),)

    D = s.decoder_width
    visible_BTD = made(s.batch, 1 + s.keep, D, device=device, dtype=torch.bfloat16, grad=True)
    mask_token_D = made(D, device=device, grad=True)
    ids_restore_BL = _ids(s, device).ids_restore_BL.contiguous()
    positions_SD = made(1 + s.patches, D, device=device)
    return Case(call, (visible_BTD, mask_token_D, ids_restore_BL, positions_SD), (visible_BTD, mask_token_D))


def _images(s: Size, device: torch.device) -> Tensor:
    return torch.randint(0, 256, (s.batch, s.image, s.image, s.channels), dtype=torch.uint8, device=device)


def masked_patch_loss(s: Size, device: torch.device) -> Case:
    def call(pred_BMP, images_BHWC, ids_BM, mean_C, std_C, *, kernels):
        where = {"patch": s.patch, "mean_C": mean_C, "std_C": std_C}
        return (ops.masked_patch_loss(pred_BMP, images_BHWC, ids_BM, **where, kernels=kernels),)

    pred_BMP = made(s.batch, s.masked, s.pixels, device=device, dtype=torch.bfloat16, grad=True)
    mean_C, std_C = (torch.tensor(values, device=device) for values in (_MEAN, _STD))
    ids_BM = _ids(s, device).ids_masked_BM.contiguous()
    return Case(call, (pred_BMP, _images(s, device), ids_BM, mean_C, std_C), (pred_BMP,))


def info_nce(s: Size, device: torch.device) -> Case:
    """One rank, N = B, float32 as the projector's BatchNorm gives it."""

    def call(masked_BE, visible_BE, *, kernels):
        return (ops.info_nce(masked_BE, visible_BE, tau=_TAU, kernels=kernels),)

    masked_BE = made(s.batch, s.embedding, device=device)
    visible_BE = made(s.batch, s.embedding, device=device, grad=True)
    return Case(call, (masked_BE, visible_BE), (visible_BE,))


def hog_target(s: Size, device: torch.device) -> Case:
    def call(images_BHWC, ids_BM, *, kernels):
        where = {"patch": s.patch, "bins": s.bins, "cell": s.cell}
        return (ops.hog_target(images_BHWC, ids_BM, **where, kernels=kernels),)

    return Case(call, (_images(s, device), _ids(s, device).ids_masked_BM.contiguous()))


CASES: dict[str, Callable[[Size, torch.device], Case]] = {
    "sample_partition": sample_partition,
    "divide_tokens": divide_tokens,
    "cls_row": cls_row,
    "gather_tokens": gather_tokens,
    "restore_tokens": restore_tokens,
    "masked_patch_loss": masked_patch_loss,
    "info_nce": info_nce,
    "hog_target": hog_target,
}
