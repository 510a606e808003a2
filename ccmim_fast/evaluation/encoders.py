"""The encoder of any checkpoint becomes timm's own module: of a run, an export, MAE's file, or a name of timm's."""

# B batch, H height, W width, C channels, T tokens (prefix tokens first), D width

import math
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ccmim_fast.checkpoints.convert import to_timm
from ccmim_fast.checkpoints.published import Weights, read_weights, with_arch
from ccmim_fast.errors import CheckpointError, ConfigError, one_line

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Shares = tuple[tuple[int, int], ...]  # numerator and denominator
OUTPUTS: Shares = ((1, 3), (1, 2), (2, 3), (1, 1))  # blocks 3 5 7 11 of 12, 7 11 15 23 of 24; BEiT, CAE
QUARTERS: Shares = ((1, 4), (1, 2), (3, 4), (1, 1))  # blocks 2 5 8 11 of 12; where ViTDet attends globally
_HEADS = ("head.", "head_dist.", "fc_norm.", "attn_pool.")  # timm's names of what stands behind the tokens


def read_encoder(checkpoint: str, arch: str = "", num_heads: int = 0) -> Weights:
    """Read the encoder of a checkpoint (see `read_weights`): its tensors under timm's names, empty for initial weights.

    For `arch` and `num_heads` see `with_arch`; a run tells its architecture itself. Raises CheckpointError: missing,
    damaged, or without an encoder; ConfigError: a name that timm does not know, or one that must be told.
    """
    found = read_weights(checkpoint)
    if not Path(checkpoint).is_dir():
        found = with_arch(found, arch, num_heads)
    tensors = {k: value for k, value in to_timm(found.tensors).items() if not k.startswith(_HEADS)}
    if found.tensors and not {"patch_embed.proj.weight", "blocks.0.norm1.weight"} <= tensors.keys():
        raise CheckpointError(f"{found.name}: no vision transformer under timm's names in it")
    mean, std = (found.mean, found.std) if found.mean and found.std else IMAGENET
    return found._replace(tensors=tensors, mean=mean, std=std)


def width_and_patch(weights: Weights) -> tuple[int, int]:
    """Return the width of the encoder and its patch in pixels, 0 where an architecture of timm's names none."""
    if weights.tensors:
        sizes = _sizes_in(weights.tensors)
        return sizes["embed_dim"], sizes["patch_size"]
    with torch.device("meta"):
        vit = timm.create_model(weights.arch, num_classes=0)
    return vit.num_features, to_2tuple(getattr(getattr(vit, "patch_embed", None), "patch_size", 0))[0]


def build_encoder(
    weights: Weights,
    image_size: tuple[int, int],
    num_heads: int = 0,
    *,
    num_classes: int = 0,
    pool: str = "",
    drop_path: float = 0.0,
    any_size: bool = False,
    plain: bool = False,
) -> nn.Module:
    """Build timm's module with the weights in it; positions are resampled to the size of the images.

    Args:
        image_size: height and width in pixels.
        num_heads: in place of the checkpoint's or the architecture's own where not 0.
        num_classes: of a new head.
        pool: for fine-tuning, `avg` (mean of the patches' tokens, then a new norm; MAE) or `cls`; empty: frozen, tokens
            are asked for by `forward_features`.
        any_size: images may have any multiple of the patch as sides; positions are resampled again for each batch.
        plain: of a VisionTransformer alone, as are all weights of a checkpoint.

    Raises CheckpointError: names or shapes that do not fit the architecture; ConfigError: an architecture that takes no
    images of this size, or is no VisionTransformer.
    """
    options = {"img_size": image_size, "num_classes": num_classes, "in_chans": len(weights.mean)}
    if weights.tensors:
        heads = num_heads or weights.num_heads
        options |= _sizes_in(weights.tensors) | ({"num_heads": heads} if heads else {})
        options |= {"fc_norm": False, "global_pool": "token" if options["class_token"] else ""}
    if pool == "cls" and not options.get("class_token", True):
        raise ConfigError(f"model.pool=cls: {weights.name} has no [CLS] token; nearest valid is avg")
    options |= {"drop_path_rate": drop_path} if drop_path else {}
    options |= {"dynamic_img_size": True} if any_size else {}
    options |= {"global_pool": {"avg": "avg", "cls": "token"}[pool], "fc_norm": pool == "avg"} if pool else {}
    try:
        vit = timm.create_model(weights.arch, pretrained=False, **options)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        line = f"model.arch={weights.arch}: timm cannot build it for these images: {one_line(error)}"
        raise ConfigError(line) from None
    if (plain or weights.tensors) and not isinstance(vit, VisionTransformer):
        raise ConfigError(f"model.arch={weights.arch} is a {type(vit).__name__}; it must be a VisionTransformer here")
    if weights.tensors:
        _fill(vit, weights)
    return vit


def _sizes_in(tensors: dict[str, Tensor]) -> dict[str, int | bool]:
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    return {"patch_size": patch, "embed_dim": width, "depth": depth, "class_token": "cls_token" in tensors}


def _fill(vit: VisionTransformer, weights: Weights) -> None:
    """Load what the checkpoint has; only a new head and its norm may be missing, and only the old norm be left over."""
    try:
        result = vit.load_state_dict(_fitted(vit, weights), strict=False)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{weights.name}: does not fit {weights.arch}: {one_line(error, 300)}") from None
    missing = [name for name in result.missing_keys if not name.startswith(("head.", "fc_norm."))]
    surplus = [name for name in result.unexpected_keys if not name.startswith("norm.")]
    if missing or surplus:
        which = f"lacks {missing[0]}" if missing else f"has {surplus[0]}, which it has not"
        raise CheckpointError(f"{weights.name}: does not fit {weights.arch}: it {which}")


def _fitted(vit: VisionTransformer, weights: Weights) -> dict[str, Tensor]:
    """Return the tensors, positions resampled to the module's grid, from the checkpoint's or timm's guess of it."""
    tensors = dict(weights.tensors)
    if not weights.image_size or "pos_embed" not in tensors:
        return checkpoint_filter_fn(tensors, vit)
    positions_1TD, new = tensors.pop("pos_embed"), tuple(vit.patch_embed.grid_size)
    old = tuple(side // tensors["patch_embed.proj.weight"].shape[-1] for side in weights.image_size)
    if new != old:
        # As timm's `resample_abs_pos_embed`, which leaves alone what has as many patches as a new square.
        prefix_1PD, x_1LD = positions_1TD.tensor_split([-math.prod(old)], dim=1)
        x_1DRC = x_1LD.float().unflatten(1, old).permute(0, 3, 1, 2)
        x_1DRC = F.interpolate(x_1DRC, size=new, mode="bicubic", antialias=True)
        positions_1TD = torch.cat([prefix_1PD, x_1DRC.flatten(2).transpose(1, 2).to(x_1LD.dtype)], dim=1)
    return checkpoint_filter_fn(tensors, vit) | {"pos_embed": positions_1TD}


def out_indices(depth: int, shares: Shares) -> tuple[int, ...]:
    """Return the index of the last block of each share of an encoder; in a shallow one some come twice."""
    return tuple(-(-depth * part // whole) - 1 for part, whole in shares)


def keep_blocks_(vit: VisionTransformer, shares: Shares) -> tuple[int, ...]:
    """Take away what stands behind the blocks: other ranks would wait for its gradient. Returns `out_indices`."""
    blocks = out_indices(len(vit.blocks), shares)
    vit.prune_intermediate_layers(list(blocks), prune_norm=True)
    return blocks


def maps_of(vit: VisionTransformer, blocks: tuple[int, ...], pixels_BCHW: Tensor) -> list[Tensor]:
    """Return the outputs of the blocks as maps [B, D, h, w]; of a block that comes twice, twice."""
    taken = sorted(set(blocks))
    maps = dict(zip(taken, vit.forward_intermediates(pixels_BCHW, indices=taken, intermediates_only=True)))
    return [maps[block] for block in blocks]


class Tokens(nn.Module):
    """This module turns images [B, C, H, W] in 0..1 into final tokens [B, T, D], prefix first; it normalises them."""

    def __init__(self, vit: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.vit, self.prefix, self.width = vit, vit.num_prefix_tokens, vit.num_features
        self.register_buffer("mean_C11", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std_C11", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.forward_features((images - self.mean_C11) / self.std_C11)


class Encoder(Tokens):
    """This module does the same with uint8 images [B, H, W, C]."""

    def forward(self, images_BHWC: Tensor) -> Tensor:
        return super().forward(images_BHWC.permute(0, 3, 1, 2) / 255)
