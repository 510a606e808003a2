"""This file embeds pixels as tokens, and passes tokens through the encoder's blocks.

The normalisation of the images is folded into the patch embedding, and its gradient is computed for visible patches
alone.
"""

# B batch, H height, W width, C channels, L patches, K visible, P prefix tokens, T tokens, D width, A values, N heads,
# R sines and cosines of a rotation, two for each channel of a head

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ccmim_fast.models.block import ViTBlock
from ccmim_fast.models.watched import watched
from ccmim_kernels import Embedded, embed_tokens, patchify

TOKENS = ("cls_token", "dist_token", "reg_token", "mask_token")  # the names of weights that are single tokens


def patch_size_of(vit: VisionTransformer) -> int:
    """Return the side of a patch in pixels."""
    return vit.patch_embed.patch_size[0]


def attention_of(vit: VisionTransformer) -> nn.Module:
    """Return the first block's attention, of several the first; in a parallel block it is the block itself."""
    return next(part for part in vit.blocks[0].modules() if hasattr(part, "num_heads"))


def heads_of(vit: VisionTransformer) -> int:
    """Return the heads of `attention_of`."""
    return attention_of(vit).num_heads


def grid_of(vit: VisionTransformer) -> tuple[int, int]:
    """Return rows and columns of patches."""
    return tuple(vit.patch_embed.grid_size)


def folded_projection(vit: VisionTransformer, mean_C: Tensor, std_C: Tensor) -> tuple[Tensor, Tensor]:
    """Fold (u / 255 - mean) / std into the patch projection: weight [D, A] and bias [D] for patches of pixels u."""
    projection = vit.patch_embed.proj
    scale_C = 1 / (255 * std_C)
    # Convolution weights are [D, C, p, q]; patches are flattened as (p, q, C).
    weight_DA = (projection.weight * scale_C[:, None, None]).permute(0, 2, 3, 1).flatten(1)
    bias_D = -(projection.weight.sum((2, 3)) * (mean_C / std_C)).sum(1)
    return weight_DA, bias_D if projection.bias is None else bias_D + projection.bias


def centred(images_BHWC: Tensor, mean_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return images and their mean as `folded_projection` and `embed` take them: of float32, less the mean, which is 0.

    Products in half precision keep what float32 pixels have beyond 8 bits only near zero; bytes are exact in any.
    """
    if not images_BHWC.is_floating_point():
        return images_BHWC, mean_C
    return images_BHWC - 255 * mean_C, torch.zeros_like(mean_C)


def embed(
    vit: VisionTransformer,
    images_BHWC: Tensor,
    projection: tuple[Tensor, Tensor],
    direction_D: Tensor | None = None,
    kernels: str = "auto",
) -> Embedded:
    """Embed patches, with positions: images [B, H, W, C] -> [B, L, D]; score them too where a direction is given.

    Images are uint8, or float32 that is `centred`. `projection` is from `folded_projection`, `direction_D` from
    `ScoreSource.direction`.
    """
    weight_DA, bias_D = projection
    x_BLD = F.linear(patchify(images_BHWC, patch_size_of(vit)).to(weight_DA.dtype), weight_DA, bias_D)
    x_BLD = vit.patch_embed.norm(x_BLD)
    if vit.pos_embed is None:  # rotary ones alone
        return Embedded(x_BLD, None)
    positions_LD = vit.pos_embed[0, -x_BLD.shape[1] :]
    if direction_D is None:
        return Embedded(x_BLD + positions_LD, None)
    return embed_tokens(x_BLD, positions_LD, direction_D, eps=eps_of(vit), kernels=kernels)


def eps_of(vit: VisionTransformer) -> float:
    """Return the eps of the LayerNorm that Eq. 4 reads the tokens through."""
    return getattr(vit.blocks[0].norm1, "eps", 1e-6)


class _VisibleGradient(torch.autograd.Function):
    """Forward: the visible tokens as they are. Backward: the projection's gradient, from visible patches alone."""

    @staticmethod
    def forward(ctx, visible_BTD, weight_DA, bias_D, prefix_PD, positions_LD, images_BHWC, ids_BK, patch, dtype):
        ctx.save_for_backward(images_BHWC, ids_BK)
        ctx.patch, ctx.prefix, ctx.dtype = patch, len(prefix_PD), dtype
        ctx.dtypes = weight_DA.dtype, bias_D.dtype, prefix_PD.dtype
        ctx.positions = None if positions_LD is None else (len(positions_LD), positions_LD.dtype)
        return visible_BTD.view_as(visible_BTD)

    @staticmethod
    def backward(ctx, grad_BTD):
        images_BHWC, ids_BK = ctx.saved_tensors
        weight, bias, prefix = ctx.dtypes
        pixels_KA = patches_of(images_BHWC, ids_BK, ctx.patch).flatten(0, 1).to(ctx.dtype)
        grad_KD = grad_BTD[:, ctx.prefix :].flatten(0, 1)
        grad_weight_DA = (grad_KD.to(ctx.dtype).T @ pixels_KA).to(weight)
        grad_prefix_PD = grad_BTD[:, : ctx.prefix].sum(0, dtype=prefix)
        grad_positions_LD = None
        if ctx.positions is not None:
            patches, positions = ctx.positions
            at_BKD = ids_BK[:, :, None].expand(-1, -1, grad_BTD.shape[2])
            grad_BLD = grad_BTD.new_zeros(len(ids_BK), patches, grad_BTD.shape[2])
            grad_positions_LD = grad_BLD.scatter(1, at_BKD, grad_BTD[:, ctx.prefix :]).sum(0, dtype=positions)
        grads = grad_weight_DA, grad_KD.sum(0, dtype=bias), grad_prefix_PD, grad_positions_LD
        return None, *grads, None, None, None, None


def with_gradient(
    visible_BTD: Tensor,
    projection: tuple[Tensor, Tensor],
    prefix_PD: Tensor,
    positions_LD: Tensor | None,
    images_BHWC: Tensor,
    ids_BK: Tensor,
) -> Tensor:
    """Attach the patch embedding's gradient to visible tokens that were computed without gradient.

    Of the embedding's weight gradient three quarters would be products with zeros, and its input a float image kept for
    the backward pass. Here it is K of L patches, read from the image again.

    Args:
        visible_BTD: [B, P + K, D] prefix and embedded patches, as `divide_tokens` gives them.
        projection: from `folded_projection`; receives gradients, as do `prefix_PD` [P, D] and `positions_LD` of the
            patches, None if they are fixed.
        images_BHWC: as `embed` took them; `ids_BK` int64, the patches in `visible_BTD`.
    """
    patch = math.isqrt(projection[0].shape[1] // images_BHWC.shape[3])
    kind = images_BHWC.device.type
    # As autocast does with a linear layer's gradient.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else projection[0].dtype
    return _VisibleGradient.apply(visible_BTD, *projection, prefix_PD, positions_LD, images_BHWC, ids_BK, patch, dtype)


def patches_of(images_BHWC: Tensor, ids_BK: Tensor, patch: int) -> Tensor:
    """Read some patches of each image alone: [B, K, A], values in (row, column, channel) order."""
    B, H, W, C = images_BHWC.shape
    columns = W // patch
    tiles = images_BHWC.view(B, H // patch, patch, columns, patch, C)
    image_B1 = torch.arange(B, device=ids_BK.device)[:, None]
    return tiles[image_B1, ids_BK // columns, :, ids_BK % columns].flatten(2)


def prefix_tokens(vit: VisionTransformer) -> Tensor:
    """Return [CLS], then DeiT's token of distillation or registers, with positions where the model has them: [P, D]."""
    others = [token for token in (getattr(vit, "dist_token", None), vit.reg_token) if token is not None]
    prefix_1PD = torch.cat([vit.cls_token, *others], dim=1) if others else vit.cls_token
    if not vit.no_embed_class and vit.pos_embed is not None:
        prefix_1PD = prefix_1PD + vit.pos_embed[:, : prefix_1PD.shape[1]]
    return prefix_1PD[0]


def learned_positions(vit: VisionTransformer) -> Tensor | None:
    """Return the patches' positions [L, D] where they are trained, else None."""
    if vit.pos_embed is None or not vit.pos_embed.requires_grad:
        return None
    return vit.pos_embed[0, -vit.patch_embed.num_patches :]


def with_prefix(vit: VisionTransformer, x_BLD: Tensor) -> Tensor:
    """Put the prefix in front of embedded patches: [B, L, D] -> [B, P + L, D]."""
    return torch.cat([prefix_tokens(vit).to(x_BLD.dtype).expand(len(x_BLD), -1, -1), x_BLD], dim=1)


def rotary_tables(vit: VisionTransformer, ids_BK: Tensor | None = None) -> list[dict[str, Tensor]]:
    """Return each block's rotations of its patches, as keyword arguments: `rope`, or nothing without one.

    `rope` is timm's table of sines and cosines, [L, R] for all patches, or [N, L, R] where each block and head has
    frequencies of its own, which receive gradients. For some patches of each image, `ids_BK` int64, it has their rows:
    [B, 1, K, R] or [B, N, K, R].
    """
    rope, depth = getattr(vit, "rope", None), len(vit.blocks)
    if rope is None:
        return [{}] * depth
    # A table that timm does not keep is made for a grid.
    table = rope.get_embed() if getattr(rope, "feat_shape", None) else rope.get_embed(shape=grid_of(vit))
    of_blocks = table.unbind() if table.ndim == 4 else [table] * depth
    if ids_BK is None:
        return [{"rope": table} for table in of_blocks]
    if table.ndim == 4:
        return [{"rope": table_NLR[:, ids_BK].transpose(0, 1)} for table_NLR in of_blocks]
    return [{"rope": table[ids_BK][:, None]}] * depth


def encode(
    vit: VisionTransformer,
    x_BTD: Tensor,
    ids_BK: Tensor | None = None,
    *,
    cls_only: bool = False,
    read_blocks: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Run all blocks and the final norm.

    Args:
        ids_BK: the patches that `x_BTD` has behind the prefix, int64; None: all. Only rotary positions need them.
        cls_only: compute [CLS] alone in the last block.
        read_blocks: read [CLS]'s attention in so many of the last blocks.

    Returns:
        Encoded tokens [B, T, D], or [CLS] alone [B, 1, D]; and, where attention is read, the log of the number of
        patches times its mean over those blocks and all heads [B, T - P] float32, without gradient: 0 is a patch's
        equal share.
    """
    x_BTD, total_BL = vit.norm_pre(x_BTD), None
    depth = len(vit.blocks)
    for index, (block, rotation) in enumerate(zip(vit.blocks, rotary_tables(vit, ids_BK))):
        options = dict(rotation)
        if cls_only and index == depth - 1 and isinstance(block, ViTBlock):
            options["query_BQD"] = x_BTD[:, :1]
        if index >= depth - read_blocks:
            if isinstance(block, ViTBlock):
                x_BTD, total_BL = block(x_BTD, reads_cls=True, total_BL=total_BL, **options)
            else:
                x_BTD, total_BL = watched(block, x_BTD, vit.num_prefix_tokens, "softmax", total_BL, **rotation)
        else:
            x_BTD = block(x_BTD, **options)
    x_BTD = vit.norm(x_BTD[:, :1] if cls_only else x_BTD)
    if total_BL is None:
        return x_BTD, None
    # Attention may round to zero, whose log no map could hold.
    share_BL = (total_BL * (total_BL.shape[1] / read_blocks)).clamp_min(torch.finfo(total_BL.dtype).tiny)
    return x_BTD, share_BL.log()


def tokens_of(vit: VisionTransformer, mean_C: Tensor, std_C: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the frozen encoder as a function: images [B, H, W, C] -> final tokens [B, P + L, D]."""

    def run(images_BHWC: Tensor) -> Tensor:
        images_BHWC, own_mean_C = centred(images_BHWC, mean_C)
        x_BLD, _ = embed(vit, images_BHWC, folded_projection(vit, own_mean_C, std_C))
        return encode(vit, with_prefix(vit, x_BLD))[0]

    return run
