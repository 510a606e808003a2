"""The encoder is a timm VisionTransformer, unchanged; this file builds it and runs its parts.

Nothing wraps the module, so its weights keep timm's names and load into timm as they are.
"""

# B batch, H height, W width, C channels, T tokens, D width

import math
from collections.abc import Callable

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ccmim_fast.errors import ConfigError
from ccmim_fast.models.blocks import PLAIN, BlockRunner, RowReader, is_plain
from ccmim_fast.models.embedding import embed, folded_projection, patch_size_of, prefix_tokens
from ccmim_fast.models.positions import sincos_positions


def build_encoder(
    arch: str,
    *,
    image_size: tuple[int, int],
    channels: int,
    patch_size: int = 0,
    embed_dim: int = 0,
    depth: int = 0,
    num_heads: int = 0,
    drop_path: float = 0.0,
) -> VisionTransformer:
    """A timm VisionTransformer with a [CLS] token, fixed sine-cosine positions, MAE's initial weights and no head.

    Args:
        arch: timm's name of a model whose class is VisionTransformer.
        image_size: height, width in pixels.
        patch_size, embed_dim, depth, num_heads: in place of the architecture's own where not 0.

    Raises:
        ConfigError: an unknown name, another class of model, or sizes that do not fit each other.
    """
    sizes = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    _check_width(arch, embed_dim, num_heads)
    try:
        vit = timm.create_model(
            arch,
            pretrained=False,
            num_classes=0,
            img_size=image_size,
            in_chans=channels,
            class_token=True,
            global_pool="token",
            drop_path_rate=drop_path,
            **{key: value for key, value in sizes.items() if value},
        )
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"model.arch={arch}: timm cannot build it with these sizes: {error}") from None
    _check_sizes(vit, arch, image_size)
    _fix_positions(vit)
    initialise(vit)
    return vit


def _check_width(arch: str, embed_dim: int, num_heads: int) -> None:
    """The width must be a multiple of the heads, and of 4 (sine and cosine of two axes)."""
    with torch.device("meta"):
        own = timm.create_model(arch, pretrained=False)
    if type(own) is not VisionTransformer:
        raise ConfigError(f"model.arch={arch} is a {type(own).__name__}, expected a timm VisionTransformer")
    width = embed_dim or own.embed_dim
    heads = num_heads or getattr(getattr(own.blocks[0], "attn", None), "num_heads", 1)
    if width % heads and num_heads:
        nearest = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - heads))
        raise ConfigError(f"model.num_heads={heads} must divide the width {width}; nearest: {nearest}")
    unit = math.lcm(heads, 4)
    if width % unit:
        nearest = max(unit, round(width / unit) * unit)
        raise ConfigError(f"model.embed_dim={width} must be a multiple of {unit} ({heads} heads); nearest: {nearest}")


def _check_sizes(vit: VisionTransformer, arch: str, image_size: tuple[int, int]) -> None:
    patch = patch_size_of(vit)
    for side in image_size:
        if side % patch:
            valid = max(patch, round(side / patch) * patch)
            raise ConfigError(f"data.image_size={side}: must be a multiple of {arch}'s patch {patch}; nearest: {valid}")


def _fix_positions(vit: VisionTransformer) -> None:
    if vit.pos_embed is None:
        raise ConfigError("model.arch: a ViT without positions cannot reconstruct patches")
    prefix = vit.pos_embed.shape[1] - vit.patch_embed.num_patches
    table = sincos_positions(vit.embed_dim, grid_of(vit), prefix)
    vit.pos_embed = nn.Parameter(table[None], requires_grad=False)


def initialise(module: nn.Module) -> None:
    """MAE's initial weights: Xavier-uniform for linear layers and the patch projection, N(0, 0.02) for tokens."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d):
            # As if it were the linear layer it is, over a flattened patch.
            nn.init.xavier_uniform_(part.weight.view(part.weight.shape[0], -1))
    for name in ("cls_token", "reg_token", "mask_token"):
        if getattr(module, name, None) is not None:
            nn.init.normal_(getattr(module, name), std=0.02)


def grid_of(vit: VisionTransformer) -> tuple[int, int]:
    """Rows and columns of patches."""
    return tuple(vit.patch_embed.grid_size)


def encode(vit: VisionTransformer, x_BTD: Tensor, run: BlockRunner = PLAIN) -> Tensor:
    """All blocks and the final norm: [B, T, D] tokens, prefix first, -> [B, T, D]."""
    x_BTD = vit.norm_pre(x_BTD)
    for block in vit.blocks:
        x_BTD = run(block, x_BTD)
    return vit.norm(x_BTD)


def encode_cls(vit: VisionTransformer, x_BTD: Tensor, run: BlockRunner = PLAIN) -> Tensor:
    """[CLS] after all blocks and the final norm, [B, D]: the last block is computed for [CLS] alone.

    Equal to `encode(vit, x)[:, 0]`.
    """
    x_BTD = vit.norm_pre(x_BTD)
    *others, last = vit.blocks
    for block in others:
        x_BTD = run(block, x_BTD)
    x_BTD = run.some(last, x_BTD[:, :1], x_BTD) if is_plain(last) else run(last, x_BTD)
    return vit.norm(x_BTD[:, 0])


def encode_and_read(
    vit: VisionTransformer,
    x_BTD: Tensor,
    last: int,
    read: RowReader,
    run: BlockRunner = PLAIN,
    cls_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """`encode`, or [CLS] of it alone [B, 1, D], and how much [CLS] attends to each patch meanwhile.

    Args:
        x_BTD: [B, P + K, D], prefix first; the blocks must be plain.
        last: in how many blocks it is read, the last ones.

    Returns:
        the tokens, and the log of K times the attention's mean over those blocks and all heads [B, K] float32, without
        gradient: 0 is a patch's share of all the attention there is.
    """
    total_BK = None
    x_BTD = vit.norm_pre(x_BTD)
    unread = len(vit.blocks) - last
    for block in vit.blocks[:unread]:
        x_BTD = run(block, x_BTD)
    for index, block in enumerate(vit.blocks[unread:], 1):
        x_BTD, total_BK = run.reading(block, x_BTD, total_BK, read, cls_only and index == last)
    patches = total_BK.shape[1]
    # Attention may round to zero, whose log no map could hold.
    share_BK = (total_BK * (patches / last)).clamp_min(torch.finfo(total_BK.dtype).tiny)
    return vit.norm(x_BTD), share_BK.log()


def tokens_of(vit: VisionTransformer, mean_C: Tensor, std_C: Tensor) -> Callable[[Tensor], Tensor]:
    """The frozen encoder as a function: uint8 images [B, H, W, C] -> final tokens [B, P + L, D] of the whole image."""

    def run(images_BHWC: Tensor) -> Tensor:
        x_BLD = embed(vit, images_BHWC, folded_projection(vit, mean_C, std_C), mean_C, std_C)
        prefix_BPD = prefix_tokens(vit).to(x_BLD.dtype).expand(len(x_BLD), -1, -1)
        return encode(vit, torch.cat([prefix_BPD, x_BLD], dim=1))

    return run
