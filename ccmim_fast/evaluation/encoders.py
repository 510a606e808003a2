"""The encoder of any checkpoint becomes timm's own module: of a run, an export, MAE's file, or a name of timm's."""

# B batch, H height, W width, C channels, T tokens (prefix tokens first), D width

from collections.abc import Mapping
from types import MethodType, SimpleNamespace
from typing import Any, Literal

import timm
import torch
from timm.layers import to_2tuple
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ccmim_fast.checkpoints.convert import to_timm
from ccmim_fast.checkpoints.positions import grid_of_file, resampled, with_prefix
from ccmim_fast.checkpoints.published import Weights, read_weights, timm_size, with_arch
from ccmim_fast.checkpoints.told import check_form
from ccmim_fast.errors import CheckpointError, ConfigError, one_line
from ccmim_fast.models.encoder import ENCODERS, own_encoder, timms_own
from ccmim_fast.models.eva import as_eva, grouped_heads, rotary_form
from ccmim_fast.models.parts import parts_in

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Shares = tuple[tuple[int, int], ...]  # numerator and denominator
OUTPUTS: Shares = ((1, 3), (1, 2), (2, 3), (1, 1))  # blocks 3 5 7 11 of 12, 7 11 15 23 of 24; BEiT, CAE
QUARTERS: Shares = ((1, 4), (1, 2), (3, 4), (1, 1))  # blocks 2 5 8 11 of 12; where ViTDet attends globally
_HEADS = ("head.", "head_dist.", "attn_pool.")  # timm's names of what stands behind the tokens
_POOLED_NORM = "fc_norm."  # of the pooled token, where the weights have no final norm of every token


def read_encoder(checkpoint: str, arch: str = "", num_heads: int = 0, pretrained_size: tuple[int, ...] = ()) -> Weights:
    """Read the encoder of a checkpoint (see `read_weights`): its tensors under timm's names, empty for initial weights.

    For `arch` and `num_heads` see `with_arch`; a run tells its architecture itself. `pretrained_size` stands in place
    of the size of images, height and width in pixels, that the checkpoint tells. Raises CheckpointError: missing,
    damaged, or without an encoder; ConfigError: a name that timm does not know, or one that must be told.
    """
    found = read_weights(checkpoint, arch)
    if found.step is None:  # no run
        found = with_arch(found, arch, num_heads)
    tensors = {k: value for k, value in to_timm(found.tensors).items() if not k.startswith(_HEADS)}
    if "norm.weight" in tensors:
        tensors = {k: value for k, value in tensors.items() if not k.startswith(_POOLED_NORM)}
    if found.tensors and not ("patch_embed.proj.weight" in tensors and any(k.startswith("blocks.0.") for k in tensors)):
        raise CheckpointError(f"{found.name}: no vision transformer under timm's names in it")
    mean, std = (found.mean, found.std) if found.mean and found.std else IMAGENET
    return found._replace(tensors=tensors, mean=mean, std=std, image_size=pretrained_size or found.image_size)


def width_and_patch(weights: Weights) -> tuple[int, int]:
    """Return the width of the encoder and its patch in pixels, 0 where an architecture of timm's names none."""
    if weights.tensors:
        sizes = _sizes_in(weights.tensors)
        return sizes["embed_dim"], sizes["patch_size"]
    vit = timms_own(weights.arch)
    return vit.num_features, to_2tuple(getattr(getattr(vit, "patch_embed", None), "patch_size", 0))[0]


def build_encoder(
    weights: Weights,
    image_size: tuple[int, int],
    num_heads: int = 0,
    *,
    num_classes: int = 0,
    pool: str = "",
    fc_norm: bool = True,
    drop_path: float = 0.0,
    resample: Literal["antialias", "plain"] = "antialias",
    any_size: bool = False,
    plain: bool = False,
) -> nn.Module:
    """Build timm's module with the weights in it; positions are resampled to the size of the images.

    Args:
        image_size: height and width in pixels.
        num_heads: in place of the checkpoint's or the architecture's own where not 0.
        num_classes: of a new head.
        pool: for fine-tuning, `avg` (mean of the patches' tokens, see `undistilled`) or `cls`; empty: frozen, tokens
            are asked for by `forward_features`.
        fc_norm: with `avg`, a norm of the mean in place of that of every token, new unless the weights have one (MAE).
        resample: how positions are, see `positions.resampled`.
        any_size: images may have any multiple of the patch as sides; positions are resampled again for each batch.
        plain: of one of `ENCODERS` alone, as are all weights of a checkpoint.

    Raises CheckpointError: names or shapes that do not fit the architecture; ConfigError: an architecture that takes no
    images of this size, or is none of `ENCODERS`.
    """
    weights = undistilled(weights) if pool == "avg" else weights
    own = timms_own(weights.arch)
    if (plain or weights.tensors) and not isinstance(own, ENCODERS):
        known = " or ".join(of.__name__ for of in ENCODERS)
        raise ConfigError(f"model.arch={weights.arch} is a {type(own).__name__}; it must be timm's {known} here")
    _check_pool(weights, pool)
    options = {"img_size": image_size, "num_classes": num_classes, "in_chans": len(weights.mean)}
    options |= _form_in(weights, num_heads) if weights.tensors else {}
    options |= {"drop_path_rate": drop_path} if drop_path else {}
    options |= {"dynamic_img_size": True} if any_size else {}
    if pool:
        options |= {"global_pool": "token" if pool == "cls" else "avg", "fc_norm": pool == "avg" and fc_norm}
    try:
        name = weights.arch
        if weights.positions == "rope" or isinstance(own, Eva):
            name, options = eva_form(weights, weights.tensors, {"dynamic_img_size": False} | options)
        vit = timm.create_model(name, pretrained=False, **options)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        line = f"model.arch={weights.arch}: timm cannot build it for these images: {one_line(error)}"
        raise ConfigError(line) from None
    if weights.tensors:
        check_form(vit, weights, weights.arch, weights.name)
        _fill(vit, weights, resample)
    if any_size and resample == "plain" and isinstance(vit, ENCODERS) and vit.pos_embed is not None:
        vit._pos_embed = MethodType(_add_positions, vit)
    return vit


def _add_positions(vit: nn.Module, x_BRCD: Tensor) -> Any:
    """Stand in for timm's `_pos_embed` of an encoder of any size of images, whose filter is antialiased."""
    return type(vit)._pos_embed(_OfGrid(vit, tuple(x_BRCD.shape[1:3])), x_BRCD)


class _OfGrid:
    """This is an encoder, as timm's method sees it, that has positions of the very grid of a batch."""

    def __init__(self, vit: nn.Module, grid: tuple[int, int]):
        self._vit, self.patch_embed = vit, SimpleNamespace(grid_size=grid)
        self.pos_embed = resampled(vit.pos_embed, vit.patch_embed.grid_size, grid, antialias=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vit, name)


def _check_pool(weights: Weights, pool: str) -> None:
    """Refuse a pooling that is not of the weights' tokens."""
    if pool == "cls" and weights.tensors and "cls_token" not in weights.tensors:
        raise ConfigError(f"model.pool=cls: {weights.name} has no [CLS] token; nearest valid is avg")


def undistilled(weights: Weights) -> Weights:
    """Return a distilled DeiT as the same encoder with a register; others as they are.

    timm's class has two heads, of [CLS] and of its token of distillation, and pools in no other way. Of initial weights
    that token, untrained, is left out.
    """
    if not isinstance(timms_own(weights.arch), VisionTransformerDistilled):
        return weights
    tensors = {"reg_token" if name == "dist_token" else name: value for name, value in weights.tensors.items()}
    return weights._replace(tensors=tensors, arch=weights.arch.replace("_distilled", ""))


def _form_in(weights: Weights, num_heads: int) -> dict[str, Any]:
    """Return timm's arguments of a VisionTransformer for the sizes, the parts and the pooling that tensors tell."""
    tensors, heads = weights.tensors, num_heads or weights.num_heads
    sizes, normed_once = _sizes_in(tensors), f"{_POOLED_NORM}weight" in tensors
    pools = "avg" if normed_once else "token" if sizes["class_token"] else ""
    pooling = {"fc_norm": normed_once, "global_pool": pools}
    return (
        sizes
        | ({"num_heads": heads} if heads else {})
        | parts_in(tensors, timms_own(weights.arch), weights.mlp)
        | pooling
    )


def _sizes_in(tensors: dict[str, Tensor]) -> dict[str, int | bool]:
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    return {"patch_size": patch, "embed_dim": width, "depth": depth, "class_token": "cls_token" in tensors}


def eva_form(of: Weights, tensors: Mapping[str, Tensor], options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and options by which timm's Eva is built; `options` are those of a VisionTransformer.

    `tensors` are the module's; none for initial weights. Norms stand where they have them. Raises ConfigError: an
    architecture that is no encoder.
    """
    own = own_encoder(of.arch)
    name, rotary = rotary_form(of.arch, own) if of.positions == "rope" else (of.arch, {})
    options = rotary | as_eva(options)
    if "fc_norm" in options:
        options["use_fc_norm"] = options.pop("fc_norm")
        normed = not tensors or {"norm.weight", f"{_POOLED_NORM}weight"} & tensors.keys()
        options["use_post_transformer_norm"] = bool(normed) and not options["use_fc_norm"]
    if tensors:
        registers = tensors.get("reg_token")
        options["num_reg_tokens"] = 0 if registers is None else registers.shape[1]
    return name, options | grouped_heads(own, options.get("depth", 0), options.get("num_heads", 0))


def _fill(vit: VisionTransformer, weights: Weights, resample: str) -> None:
    """Load what the checkpoint has; only a new head and its norm may be missing, and only the old norm be left over."""
    try:
        result = vit.load_state_dict(_fitted(vit, weights, resample), strict=False)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{weights.name}: does not fit {weights.arch}: {one_line(error, 300)}") from None
    missing = [name for name in result.missing_keys if not name.startswith(("head.", "head_dist.", "fc_norm."))]
    surplus = [name for name in result.unexpected_keys if not name.startswith("norm.")]
    if missing or surplus:
        which = f"lacks {missing[0]}" if missing else f"has {surplus[0]}, which it has not"
        raise CheckpointError(f"{weights.name}: does not fit {weights.arch}: it {which}")


def _fitted(vit: VisionTransformer, weights: Weights, resample: str) -> dict[str, Tensor]:
    """Return the tensors, positions resampled to the module's grid from that of the file."""
    tensors, new = dict(weights.tensors), tuple(vit.patch_embed.grid_size)
    # Fine-tuned from [CLS], or maps of tokens: the one norm is of every token.
    if not isinstance(vit.norm, nn.Identity):
        tensors = {name.replace(_POOLED_NORM, "norm."): value for name, value in tensors.items()}
    if "pos_embed" not in tensors:
        return tensors
    patch, prefix = vit.patch_embed.patch_size[0], 0 if vit.no_embed_class else vit.num_prefix_tokens
    likely, squares = [timm_size(weights.arch)], [vit.patch_embed.img_size] * (new[0] == new[1])
    told, setting = weights.image_size, "--model.pretrained_size"
    among, old = grid_of_file(weights.name, tensors, prefix > 0, patch, told, likely, squares, setting)
    tensors = with_prefix(tensors, among, prefix)
    return tensors | {"pos_embed": resampled(tensors["pos_embed"], old, new, resample == "antialias")}


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
    """This module turns images [B, C, H, W] in 0..1 into final tokens [B, T, D], prefix first; it normalises them.

    `norm` is what the weights have behind the pooling of tokens, in place of a norm of every token.
    """

    def __init__(self, vit: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.vit, self.prefix, self.width = vit, vit.num_prefix_tokens, vit.num_features
        self.norm = getattr(vit, "fc_norm", nn.Identity())
        self.register_buffer("mean_C11", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std_C11", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.forward_features((images - self.mean_C11) / self.std_C11)


class Encoder(Tokens):
    """This module does the same with uint8 images [B, H, W, C]."""

    def forward(self, images_BHWC: Tensor) -> Tensor:
        return super().forward(images_BHWC.permute(0, 3, 1, 2) / 255)
