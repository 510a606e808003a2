"""The op `masked_patch_loss` compares predicted with true pixels over the masked patches.

An image is cut into patches in MAE's order: patches row by row, and (row, column, channel) inside a patch.
"""

# B batch, H height, W width, C channels, L patches, M masked, P patch * patch * C

from typing import Any

import torch
from torch import Tensor

from ccmim_kernels.dispatch import check_pixels, choosable, operator, uses_triton, widened

NORM_PIX_EPS = 1e-6  # MAE


def patchify(images_BHWC: Tensor, patch: int) -> Tensor:
    """Return the patches of images, [B, H, W, C] -> [B, L, patch * patch * C], any dtype; `patch` divides H and W."""
    B, H, W, C = images_BHWC.shape
    if H % patch or W % patch:
        raise ValueError(f"image {H}x{W} is no multiple of patch={patch}")
    grid = images_BHWC.reshape(B, H // patch, patch, W // patch, patch, C)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(B, -1, patch * patch * C)


def unpatchify(patches_BLP: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Invert `patchify`: [B, L, patch * patch * C] -> [B, height, width, C]."""
    B, _, P = patches_BLP.shape
    C = P // patch**2
    grid = patches_BLP.reshape(B, height // patch, width // patch, patch, patch, C)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(B, height, width, C)


def masked_target(
    images_BHWC: Tensor, ids_masked_BM: Tensor, patch: int, mean_C: Tensor, std_C: Tensor, norm_pix: bool
) -> Tensor:
    """Return the target of `masked_patch_loss`, [B, M, P] in the dtype of `mean_C`."""
    patches_BLP = patchify(images_BHWC, patch)
    index_BMP = ids_masked_BM[..., None].expand(-1, -1, patches_BLP.shape[-1])
    pixels_BMP = patches_BLP.gather(1, index_BMP).to(mean_C.dtype) / 255
    channels = patch * patch
    target_BMP = (pixels_BMP - mean_C.repeat(channels)) / std_C.repeat(channels)
    if not norm_pix:
        return target_BMP
    mean_BM1 = target_BMP.mean(-1, keepdim=True)
    var_BM1 = target_BMP.var(-1, keepdim=True, unbiased=True)
    return (target_BMP - mean_BM1) / (var_BM1 + NORM_PIX_EPS).sqrt()


def masked_patch_loss_reference(pred_BMP: Tensor, *target: Any) -> Tensor:
    """Specify `masked_patch_loss` in plain PyTorch; `target` is what `masked_target` takes."""
    with torch.no_grad():
        target_BMP = masked_target(*target)
    return (pred_BMP - target_BMP).square().mean()


@choosable("masked_patch_loss")
def masked_patch_loss(
    pred_BMP: Tensor,
    images_BHWC: Tensor,
    ids_masked_BM: Tensor,
    *,
    patch: int,
    mean_C: Tensor,
    std_C: Tensor,
    norm_pix: bool = True,
    kernels: str = "auto",
) -> Tensor:
    """Compute L_recons (Eq. 9): mean squared error between prediction and pixels, over the masked patches only.

    The target is x = (u / 255 - mean) / std of the pixels u, with `norm_pix` normalised per patch as in MAE:
    (x - E[x]) / sqrt(Var[x] + 1e-6), the variance unbiased.

    Args:
        pred_BMP: [B, M, P] float, rows in the order of `ids_masked_BM`, pixels as (row, column, channel); receives a
            gradient.
        images_BHWC: [B, H, W, C] uint8, or float32 with 255 for white.
        ids_masked_BM: [B, M] int64, 0 .. L - 1. IndexError for others on a CPU; CUDA looks at none.
        patch: pixels per side.
        mean_C, std_C: [C] float, on a 0..1 scale.
        kernels: `auto`, `triton` or `reference`, see `ccmim_kernels.dispatch`. The kernel's gradient is computed from
            the residual rounded to the prediction's dtype, and cannot be differentiated again.

    Returns:
        A scalar, the mean over B, M and P; float32, or float64 from float64.
    """
    B, M = ids_masked_BM.shape
    _, H, W, C = images_BHWC.shape
    P = patch * patch * C
    check_pixels(images_BHWC)
    if H % patch or W % patch:
        raise ValueError(f"image {H}x{W} is no multiple of patch={patch}")
    if len(images_BHWC) != B:
        raise ValueError(f"images are {len(images_BHWC)}, ids are of {B}")
    if mean_C.numel() != C or std_C.numel() != C:
        raise ValueError(f"mean_C and std_C have {mean_C.numel()} and {std_C.numel()} entries, expected {C}")
    if tuple(pred_BMP.shape) != (B, M, P):
        raise ValueError(f"prediction is {list(pred_BMP.shape)}, expected [{B}, {M}, {P}]")
    inputs = (images_BHWC, ids_masked_BM, patch, mean_C, std_C, norm_pix)
    reals = [pred_BMP, mean_C, std_C, *([images_BHWC] if images_BHWC.is_floating_point() else [])]
    if uses_triton(kernels, "masked_patch_loss", images_BHWC.device, *reals):
        return _masked_patch_loss(pred_BMP, *inputs)[0]
    return masked_patch_loss_reference(widened(pred_BMP), *inputs)


def _save(ctx, inputs, output):
    _, residual_BMP = output
    ctx.mark_non_differentiable(residual_BMP)
    ctx.save_for_backward(residual_BMP)


def _backward(ctx, grad, _):
    (residual_BMP,) = ctx.saved_tensors
    # Three dimensions: a scalar would be rounded to the residual's dtype before it multiplies.
    scale_111 = (2 * grad / residual_BMP.numel()).reshape(1, 1, 1)
    # Straight into the prediction's dtype: no float32 copy of the gradient is made.
    grad_pred_BMP = torch.mul(residual_BMP, scale_111, out=torch.empty_like(residual_BMP))
    return grad_pred_BMP, None, None, None, None, None, None


@operator("masked_patch_loss", _save, _backward)
def _masked_patch_loss(
    pred: Tensor, images: Tensor, ids_masked: Tensor, patch: int, mean: Tensor, std: Tensor, norm_pix: bool
) -> tuple[Tensor, Tensor]:
    return pred.new_empty((), dtype=torch.float32), pred.new_empty(pred.shape)
