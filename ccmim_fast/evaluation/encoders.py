"""The encoder of any checkpoint, as timm's own module: a run of ours, an export, MAE's file, or a name of timm's."""

# B batch, H height, W width, C channels, T tokens (prefix tokens first), D width

import math
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.convert import to_timm
from ccmim_fast.checkpoints.published import TIMM, assumed_arch, known_arch, read_published
from ccmim_fast.config.load import from_yaml
from ccmim_fast.errors import CheckpointError, ConfigError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Shares = tuple[tuple[int, int], ...]  # numerator and denominator
OUTPUTS: Shares = ((1, 3), (1, 2), (2, 3), (1, 1))  # blocks 3 5 7 11 of 12, 7 11 15 23 of 24; BEiT, CAE
QUARTERS: Shares = ((1, 4), (1, 2), (3, 4), (1, 1))  # blocks 2 5 8 11 of 12; where ViTDet attends globally
_HEADS = ("head.", "head_dist.", "fc_norm.", "attn_pool.")  # timm's names of what stands behind the tokens


class Weights(NamedTuple):
    """What a checkpoint tells of its encoder.

    Attributes:
        name: the checkpoint, for people.
        arch: timm's name.
        tensors: under timm's names; None: the architecture's initial weights.
        num_heads: 0 where it does not tell.
        mean, std: of the images it was trained on, per channel.
        step: optimizer steps of pretraining; None where it does not tell.
        grid: rows and columns of patches that the positions are of; empty where it does not tell.
    """

    name: str
    arch: str
    tensors: dict[str, Tensor] | None
    num_heads: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    step: int | None = None
    grid: tuple[int, ...] = ()


def read_weights(checkpoint: str, arch: str = "", num_heads: int = 0) -> Weights:
    """Read the encoder of a checkpoint; no code in it is run.

    Args:
        checkpoint: the folder of a run, or of one of its checkpoints; what `read_published` reads; `timm:ARCH` for
            initial weights.
        arch: timm's name, in place of what a file tells; empty: that, or what `assumed_arch` says.
        num_heads: what the user tells of attention; 0: nothing.

    Raises:
        CheckpointError: missing, damaged, or without an encoder.
        ConfigError: a name that timm does not know, or one that must be told.
    """
    if checkpoint.startswith(TIMM) and "." not in checkpoint:
        return Weights(checkpoint, known_arch(checkpoint.removeprefix(TIMM)), None, 0, *IMAGENET)
    if Path(checkpoint).is_dir():
        return _of_run(Path(checkpoint))
    found = read_published(checkpoint)
    told = found.arch if checkpoint.startswith(TIMM) else arch or found.arch
    arch = known_arch(told) if told else assumed_arch(found, checkpoint, num_heads)
    images = (found.mean, found.std) if found.mean and found.std else IMAGENET
    encoder = _encoder_in(to_timm(found.tensors), checkpoint)
    grid = _grid_of(found.image_size, encoder)
    return Weights(checkpoint, arch, encoder, found.num_heads, *images, grid=grid)


def _of_run(path: Path) -> Weights:
    """The newest checkpoint of a run, or the one at `path`; averaged weights where it has them."""
    if (path / io.MANIFEST).is_file():
        found = io.Newest(path, io.load(path), [])
    else:
        found = io.newest(path / "checkpoints")
    if found.state is None:
        raise CheckpointError(f"{path}: no complete checkpoint in it; {'; '.join(found.problems) or 'none at all'}")
    try:
        state = found.state
        weights, config = state["model"], from_yaml(state["config"], "the checkpoint")
        if state["ema"] is not None:
            weights = {k.removeprefix("module."): v for k, v in state["ema"].items() if k.startswith("module.")}
        tensors, step = to_timm(weights), state["progress"]["step"]
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{found.path}: it is no checkpoint of pretraining") from None
    model, data = config.model, config.data
    encoder = _encoder_in(tensors, found.path)
    grid = _grid_of(data.image_size, encoder)
    return Weights(str(found.path), model.arch, encoder, model.num_heads, data.mean, data.std, step, grid)


def _encoder_in(tensors: dict[str, Any], name: str | Path) -> dict[str, Tensor]:
    if "patch_embed.proj.weight" not in tensors or "blocks.0.norm1.weight" not in tensors:
        raise CheckpointError(f"{name}: no vision transformer under timm's names in it")
    return {key: value for key, value in tensors.items() if not key.startswith(_HEADS)}


def _grid_of(image_size: tuple[int, ...], tensors: dict[str, Tensor]) -> tuple[int, ...]:
    patch = tensors["patch_embed.proj.weight"].shape[-1]
    return tuple(side // patch for side in image_size)


def width_and_patch(weights: Weights) -> tuple[int, int]:
    """Of the encoder; the patch in pixels, 0 where an architecture of timm's names none."""
    if weights.tensors is not None:
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
) -> nn.Module:
    """timm's module with the weights in it; positions are resampled to the size of the images.

    Args:
        image_size: height and width in pixels.
        num_heads: in place of the checkpoint's or the architecture's own where not 0.
        num_classes: of a new head.
        pool: for fine-tuning, `avg` (mean of the patches' tokens, then a new norm; MAE) or `cls`; empty: frozen, tokens
            are asked for by `forward_features`.
        any_size: images may have any multiple of the patch as sides; positions are resampled again for each batch.

    Raises:
        CheckpointError: names or shapes that do not fit the architecture.
        ConfigError: an architecture that takes no images of this size.
    """
    options = {"img_size": image_size, "num_classes": num_classes, "in_chans": len(weights.mean)}
    if weights.tensors is not None:
        heads = num_heads or weights.num_heads
        options |= _sizes_in(weights.tensors) | {"fc_norm": False}
        options |= {"global_pool": "token" if options["class_token"] else ""}
        options |= {"num_heads": heads} if heads else {}
    if pool == "cls" and not options.get("class_token", True):
        raise ConfigError(f"model.pool=cls: {weights.name} has no [CLS] token; nearest valid is avg")
    if drop_path:
        options |= {"drop_path_rate": drop_path}
    if any_size:
        options |= {"dynamic_img_size": True}
    if pool:
        options |= {"global_pool": {"avg": "avg", "cls": "token"}[pool]}
        options |= {"fc_norm": pool == "avg"}
    try:
        vit = timm.create_model(weights.arch, pretrained=False, **options)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"model.arch={weights.arch}: timm cannot build it for these images: {reason}") from None
    if weights.tensors is not None:
        _fill(vit, weights)
    return vit


def _sizes_in(tensors: dict[str, Tensor]) -> dict[str, int | bool]:
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    return {"patch_size": patch, "embed_dim": width, "depth": depth, "class_token": "cls_token" in tensors}


def _fill(vit: nn.Module, weights: Weights) -> None:
    """Load what the checkpoint has; only a new head and its norm may be missing, and only the old norm be left over."""
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(f"model.arch={weights.arch} is a {type(vit).__name__}; weights go into a VisionTransformer")
    try:
        result = vit.load_state_dict(_fitted(vit, weights), strict=False)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{weights.name}: does not fit {weights.arch}: {reason}") from None
    missing = [name for name in result.missing_keys if not name.startswith(("head.", "fc_norm."))]
    surplus = [name for name in result.unexpected_keys if not name.startswith("norm.")]
    if missing or surplus:
        which = f"lacks {missing[0]}" if missing else f"has {surplus[0]}, which it has not"
        raise CheckpointError(f"{weights.name}: does not fit {weights.arch}: it {which}")


def _fitted(vit: VisionTransformer, weights: Weights) -> dict[str, Tensor]:
    """The tensors, their positions resampled to the module's grid, from the checkpoint's or timm's guess of it."""
    tensors = dict(weights.tensors)
    if not weights.grid or "pos_embed" not in tensors:
        return checkpoint_filter_fn(tensors, vit)
    positions, new = tensors.pop("pos_embed"), tuple(vit.patch_embed.grid_size)
    if new != weights.grid:
        positions = _resampled(positions, weights.grid, new)
    return checkpoint_filter_fn(tensors, vit) | {"pos_embed": positions}


def _resampled(positions_1TD: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """As timm's `resample_abs_pos_embed`, which once left alone what had as many patches as a new square."""
    patches = math.prod(old)
    prefix_1PD, x_1LD = positions_1TD[:, :-patches], positions_1TD[:, -patches:]
    x_1DRC = x_1LD.float().unflatten(1, old).permute(0, 3, 1, 2)
    x_1DRC = F.interpolate(x_1DRC, size=new, mode="bicubic", antialias=True)
    return torch.cat([prefix_1PD, x_1DRC.flatten(2).transpose(1, 2).to(x_1LD.dtype)], dim=1)


def out_indices(depth: int, shares: Shares) -> tuple[int, ...]:
    """Return the index of the last block of each share of an encoder; in a shallow one some come twice."""
    return tuple(-(-depth * part // whole) - 1 for part, whole in shares)


class Encoder(nn.Module):
    """uint8 images [B, H, W, C] -> final tokens [B, T, D], prefix tokens first; the images are normalised here."""

    def __init__(self, vit: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.vit, self.prefix, self.width = vit, vit.num_prefix_tokens, vit.num_features
        self.register_buffer("mean_C", torch.tensor(mean), persistent=False)
        self.register_buffer("std_C", torch.tensor(std), persistent=False)

    def forward(self, images_BHWC: Tensor) -> Tensor:
        pixels_BCHW = ((images_BHWC / 255 - self.mean_C) / self.std_C).permute(0, 3, 1, 2)
        return self.vit.forward_features(pixels_BCHW)
