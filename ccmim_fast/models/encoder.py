"""Building the encoder: a ViT of timm's of `ViTBlock`s, with fixed or rotary positions and MAE's initial weights.

Nothing wraps the module, so its weights keep timm's names and load into timm as they are.
"""

# S positions, D width

from collections.abc import Iterable
from functools import cache
from typing import Any

import timm
import torch
from timm.layers import Attention, HybridEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ccmim_fast.errors import ConfigError, one_line
from ccmim_fast.models.block import ViTBlock
from ccmim_fast.models.eva import as_eva, grouped_heads, prepare_, rotary_form
from ccmim_fast.models.parts import check_parts, chosen_parts
from ccmim_fast.models.tokens import TOKENS, grid_of, patch_size_of
from ccmim_fast.models.widths import check_width

ENCODERS = (VisionTransformer, VisionTransformerDistilled, Eva)  # timm's classes that an encoder may be of


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
    positions: str = "sincos",
    registers: int = 0,
    layer_scale: float = 0.0,
    qk_norm: bool = False,
    mlp: str = "own",
) -> VisionTransformer | Eva:
    """Build one of `ENCODERS` with a [CLS] token, MAE's initial weights, no head.

    Its blocks are `ViTBlock`s where the architecture has timm's standard ones, or Eva's; other blocks stay as they are.
    `patch_size`, `embed_dim`, `depth` and `num_heads` stand in place of the architecture's own where not 0, and so do
    `registers`, `layer_scale`, `qk_norm` and `mlp`, see `parts.chosen_parts`. Positions that the architecture adds to
    its patches are fixed sines and cosines, or `learned` from timm's initial ones; rotary ones are as it has them.
    With `rope` there are rotary ones alone, see `eva.rotary_form`.

    Raises ConfigError for an unknown name, another class of model, or sizes that do not fit each other.
    """
    sizes = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    own, parts = own_encoder(arch), {"registers": registers, "layer_scale": layer_scale, "qk_norm": qk_norm}
    check_width(own, arch, embed_dim=embed_dim, num_heads=num_heads, positions=positions, mlp=mlp)
    name, arguments = timm_form(arch, positions, **parts, mlp=mlp, **sizes)
    eva = isinstance(own, Eva) or positions == "rope"
    standard = not eva and type(own.blocks[0]) is Block and type(own.blocks[0].attn) is Attention
    try:
        vit = timm.create_model(
            name,
            pretrained=False,
            num_classes=0,
            img_size=image_size,
            in_chans=channels,
            drop_path_rate=drop_path,
            **({"block_fn": ViTBlock} if standard else {}),
            # Rotations of one grid are computed once.
            **({"dynamic_img_size": False} if eva else {}),
            **arguments,
        )
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"model.arch={arch}: timm cannot build it with these sizes: {one_line(error)}") from None
    _check_sizes(vit, arch, image_size)
    check_parts(vit, arch, **parts)
    _place(vit, arch, positions)
    if isinstance(vit, Eva):
        prepare_(vit)
    initialise(vit)
    configure_blocks(vit.blocks, num_prefix_tokens=vit.num_prefix_tokens)
    return vit


def timm_form(
    arch: str,
    positions: str,
    *,
    registers: int,
    layer_scale: float,
    qk_norm: bool,
    mlp: str,
    **sizes: int,
) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments, beside images, by which timm makes an encoder's module; see `build_encoder`.

    Raises ConfigError: the architecture cannot have these parts or positions, or is of another class.
    """
    own, given = own_encoder(arch), {key: value for key, value in sizes.items() if value}
    parts = chosen_parts(
        own,
        arch,
        given.get("embed_dim", own.embed_dim),
        registers=registers,
        layer_scale=layer_scale,
        qk_norm=qk_norm,
        mlp=mlp,
    )
    form = {"class_token": True, "global_pool": "token"} | grouped_heads(own, **given)
    if positions != "rope":
        return arch, form | given | parts
    name, rotary = rotary_form(arch, own)
    return name, form | rotary | given | as_eva(parts)


def configure_blocks(blocks: Iterable[nn.Module], **attributes: object) -> None:
    """Set attributes of `ViTBlock` (`attention`, `kernels`, `recompute`, ...) on all blocks of that class."""
    for block in blocks:
        if isinstance(block, ViTBlock):
            for name, value in attributes.items():
                setattr(block, name, value)


@cache
def timms_own(arch: str) -> nn.Module:
    """Build an architecture of any class as timm has it, without memory; not to be changed."""
    with torch.device("meta"):
        return timm.create_model(arch, pretrained=False)


def own_encoder(arch: str) -> VisionTransformer | Eva:
    """Return `timms_own`. Raises ConfigError for one that is no encoder."""
    own = timms_own(arch)
    if type(own) not in ENCODERS:
        raise ConfigError(f"model.arch={arch} is a {type(own).__name__}; expected timm's VisionTransformer or Eva")
    if isinstance(own.patch_embed, HybridEmbed):
        reason = "embeds patches by a convolutional network, by which visible tokens would see masked pixels"
        raise ConfigError(f"model.arch={arch}: {reason}; take a ViT without one, as vit_base_patch16_224")
    return own


def _place(vit: VisionTransformer | Eva, arch: str, positions: str) -> None:
    """Give an encoder its positions; learned ones stay as timm drew them, N(0, 0.02)."""
    if vit.pos_embed is None:
        if getattr(vit, "rope", None) is None:
            raise ConfigError(f"model.arch={arch}: a ViT without positions cannot reconstruct patches")
        if positions == "learned":
            raise ConfigError(f"model.positions=learned: {arch} has rotary ones alone; nearest valid is rope")
    elif positions != "learned":
        prefix = vit.pos_embed.shape[1] - vit.patch_embed.num_patches
        positions_SD = sincos_positions(vit.embed_dim, grid_of(vit), prefix)
        vit.pos_embed = nn.Parameter(positions_SD[None], requires_grad=False)


def _check_sizes(vit: VisionTransformer, arch: str, image_size: tuple[int, int]) -> None:
    patch = patch_size_of(vit)
    for side in image_size:
        if side % patch:
            valid = max(patch, round(side / patch) * patch)
            raise ConfigError(f"data.image_size={side}: must be a multiple of {arch}'s patch {patch}; nearest: {valid}")


def initialise(module: nn.Module) -> None:
    """Draw MAE's initial weights: Xavier-uniform for linear layers and the patch projection, N(0, 0.02) for tokens."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d):
            # As if it were the linear layer it is, over a flattened patch.
            nn.init.xavier_uniform_(part.weight.view(part.weight.shape[0], -1))
    for name in TOKENS:
        if getattr(module, name, None) is not None:
            nn.init.normal_(getattr(module, name), std=0.02)


def _axis(dim: int, coordinate_S: Tensor) -> Tensor:
    """Return [S, dim] float64: sines, then cosines, of coordinate / 10000^(2i / dim)."""
    frequency = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = coordinate_S[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_positions(dim: int, grid: tuple[int, int], prefix: int) -> Tensor:
    """Return fixed 2-D sine-cosine positions [prefix + rows * columns, dim] float32; zeros for the prefix.

    The first half of the channels encodes the column, the second the row, as in MAE's published checkpoints. Raises
    ValueError where `dim` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim={dim} must be a multiple of 4")
    rows, columns = grid
    row_S = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column_S = torch.arange(columns, dtype=torch.float64).repeat(rows)
    table = torch.cat([_axis(dim // 2, column_S), _axis(dim // 2, row_S)], dim=1)
    return torch.cat([torch.zeros(prefix, dim), table.float()])
