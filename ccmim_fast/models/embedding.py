"""From pixels to tokens: the patch embedding with the images' normalisation folded in, and its gradient."""

# B batch, H height, W width, C channels, L patches, K visible, P prefix tokens, T = P + K, D width, A values

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ccmim_kernels import patchify


def patch_size_of(vit: VisionTransformer) -> int:
    return vit.patch_embed.patch_size[0]


def folded_projection(vit: VisionTransformer, mean_C: Tensor, std_C: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [D, A] and bias [D] that embed patches of uint8 values: (u / 255 - mean) / std is folded into them."""
    projection = vit.patch_embed.proj
    scale_C = 1 / (255 * std_C)
    # Convolution weights are [D, C, p, q]; patches are flattened as (p, q, C).
    weight_DA = (projection.weight * scale_C[:, None, None]).permute(0, 2, 3, 1).flatten(1)
    bias_D = -(projection.weight.sum((2, 3)) * (mean_C / std_C)).sum(1)
    return weight_DA, bias_D if projection.bias is None else bias_D + projection.bias


def embed(
    vit: VisionTransformer, images_BHWC: Tensor, projection: tuple[Tensor, Tensor] | None, mean_C: Tensor, std_C: Tensor
) -> Tensor:
    """Patch embedding with positions: uint8 [B, H, W, C] -> [B, L, D].

    Args:
        projection: from `folded_projection`, so that no float image is made; None: normalise, then convolve.
    """
    if projection is None:
        pixels_BCHW = ((images_BHWC.to(mean_C.dtype) / 255 - mean_C) / std_C).permute(0, 3, 1, 2)
        x_BLD = vit.patch_embed.proj(pixels_BCHW).flatten(2).transpose(1, 2)
    else:
        weight_DA, bias_D = projection
        x_BLD = F.linear(patchify(images_BHWC, patch_size_of(vit)).to(weight_DA.dtype), weight_DA, bias_D)
    x_BLD = vit.patch_embed.norm(x_BLD)
    return x_BLD + vit.pos_embed[:, -x_BLD.shape[1] :]


class _VisibleGradient(torch.autograd.Function):
    """Forward: the visible tokens as they are. Backward: what produced them, computed for visible patches alone."""

    @staticmethod
    def forward(ctx, visible_BTD, weight_DA, bias_D, prefix_PD, images_BHWC, ids_BK, patch, dtype):
        ctx.save_for_backward(images_BHWC, ids_BK)
        ctx.patch, ctx.prefix, ctx.dtype = patch, len(prefix_PD), dtype
        ctx.dtypes = weight_DA.dtype, bias_D.dtype, prefix_PD.dtype
        return visible_BTD.view_as(visible_BTD)

    @staticmethod
    def backward(ctx, grad_BTD):
        images_BHWC, ids_BK = ctx.saved_tensors
        weight, bias, prefix = ctx.dtypes
        pixels_KA = patches_of(images_BHWC, ids_BK, ctx.patch).flatten(0, 1).to(ctx.dtype)
        grad_KD = grad_BTD[:, ctx.prefix :].flatten(0, 1)
        grad_weight_DA = (grad_KD.to(ctx.dtype).T @ pixels_KA).to(weight)
        grad_prefix_PD = grad_BTD[:, : ctx.prefix].sum(0, dtype=prefix)
        return None, grad_weight_DA, grad_KD.sum(0, dtype=bias), grad_prefix_PD, None, None, None, None


def with_gradient(
    visible_BTD: Tensor, projection: tuple[Tensor, Tensor], prefix_PD: Tensor, images_BHWC: Tensor, ids_BK: Tensor
) -> Tensor:
    """The visible tokens, computed without gradient, with the gradient of the patch embedding attached.

    Of the embedding's weight gradient three quarters would be products with zeros, and its input a float image kept for
    the backward pass. Here it is K of L patches, read from the uint8 image again.

    Args:
        visible_BTD: [B, P + K, D] prefix and embedded patches, as `divide_tokens` gives them.
        projection: from `folded_projection`; receives gradients, as does `prefix_PD` [P, D].
        images_BHWC: uint8; `ids_BK` int64, the patches in `visible_BTD`.
    """
    patch = math.isqrt(projection[0].shape[1] // images_BHWC.shape[3])
    kind = images_BHWC.device.type
    # As autocast does with a linear layer's gradient.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else projection[0].dtype
    return _VisibleGradient.apply(visible_BTD, *projection, prefix_PD, images_BHWC, ids_BK, patch, dtype)


def patches_of(images_BHWC: Tensor, ids_BK: Tensor, patch: int) -> Tensor:
    """[B, K, A]: some patches of each image, values in (row, column, channel) order; reads these patches alone."""
    B, H, W, C = images_BHWC.shape
    columns = W // patch
    tiles = images_BHWC.view(B, H // patch, patch, columns, patch, C)
    image_B1 = torch.arange(B, device=ids_BK.device)[:, None]
    return tiles[image_B1, ids_BK // columns, :, ids_BK % columns].flatten(2)


def prefix_tokens(vit: VisionTransformer) -> Tensor:
    """[P, D]: [CLS], then registers, with their positions where the model has them."""
    prefix_1PD = vit.cls_token if vit.reg_token is None else torch.cat([vit.cls_token, vit.reg_token], dim=1)
    if not vit.no_embed_class:
        prefix_1PD = prefix_1PD + vit.pos_embed[:, : prefix_1PD.shape[1]]
    return prefix_1PD[0]
