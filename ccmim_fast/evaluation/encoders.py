"""The encoder of any checkpoint, as timm's own module: a run of ours, an export, MAE's file, or a name of timm's."""

# B batch, H height, W width, C channels, T tokens (prefix tokens first), D width

from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.convert import from_flat, read_flat_file, to_timm
from ccmim_fast.config.load import from_yaml
from ccmim_fast.errors import CheckpointError, ConfigError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DEFAULT_ARCH = "vit_base_patch16_224"


class Weights(NamedTuple):
    """What a checkpoint tells of its encoder.

    Attributes:
        name: the checkpoint, for people.
        arch: timm's name.
        tensors: under timm's names; None: the architecture's initial weights.
        num_heads: 0 where it does not tell.
        mean, std: of the images it was trained on, per channel.
    """

    name: str
    arch: str
    tensors: dict[str, Tensor] | None
    num_heads: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_weights(checkpoint: str, arch: str = "") -> Weights:
    """Read the encoder of a checkpoint; no code in it is run.

    Args:
        checkpoint: the folder of a run, or of one of its checkpoints; a file `.safetensors` (timm's names) or `.pth`,
            `.pt`, `.bin` (timm's or MAE's); `timm:NAME` for initial weights.
        arch: timm's name, where the checkpoint does not tell; empty: vit_base_patch16_224.

    Raises:
        CheckpointError: missing, damaged, or without an encoder.
        ConfigError: a name that timm does not know.
    """
    if checkpoint.startswith("timm:"):
        return Weights(checkpoint, _known(checkpoint.removeprefix("timm:")), None, 0, *IMAGENET)
    path = Path(checkpoint)
    if path.is_dir():
        return _of_run(path)
    arch = _known(arch or _DEFAULT_ARCH)
    if path.suffix == ".safetensors":
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read as weights: {' '.join(str(error).split())[:200]}") from None
    else:
        flat = read_flat_file(checkpoint)
        flat = flat.get("model", flat)
        if not isinstance(flat, dict) or not all(isinstance(name, str) for name in flat):
            raise CheckpointError(f"{path}: holds no tensors by name")
        tensors = to_timm(from_flat(flat))
    return Weights(checkpoint, arch, _encoder_in(tensors, path), 0, *IMAGENET)


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
        tensors = to_timm(weights)
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{found.path}: it is no checkpoint of pretraining") from None
    model, data = config.model, config.data
    return Weights(str(found.path), model.arch, _encoder_in(tensors, found.path), model.num_heads, data.mean, data.std)


def _encoder_in(tensors: dict[str, Any], path: Path) -> dict[str, Tensor]:
    if "patch_embed.proj.weight" not in tensors or "blocks.0.norm1.weight" not in tensors:
        raise CheckpointError(f"{path}: no vision transformer under timm's names in it")
    return {name: value for name, value in tensors.items() if not name.startswith(("head.", "fc_norm."))}


def _known(arch: str) -> str:
    from ccmim_fast.config.keys import nearest

    names = timm.list_models("*vit*") + timm.list_models("*deit*")
    if not timm.is_model(arch):
        raise ConfigError(f"model.arch={arch!r:.80}: no model of timm; nearest is {nearest(arch, names)}")
    return arch


def build_encoder(
    weights: Weights,
    image_size: tuple[int, int],
    num_heads: int = 0,
    *,
    num_classes: int = 0,
    pool: str = "",
    drop_path: float = 0.0,
) -> nn.Module:
    """timm's module with the weights in it; positions are resampled to the size of the images.

    Args:
        image_size: height and width in pixels.
        num_heads: in place of the checkpoint's or the architecture's own where not 0.
        num_classes: of a new head.
        pool: for fine-tuning, `avg` (mean of the patches' tokens, then a new norm; MAE) or `cls`; empty: frozen, tokens
            are asked for by `forward_features`.

    Raises:
        CheckpointError: names or shapes that do not fit the architecture.
        ConfigError: an architecture that takes no images of this size.
    """
    options = {"img_size": image_size, "num_classes": num_classes, "in_chans": len(weights.mean)}
    if weights.tensors is not None:
        heads = num_heads or weights.num_heads
        options |= _sizes_in(weights.tensors) | {"class_token": True, "global_pool": "token"}
        options |= {"num_heads": heads} if heads else {}
    if pool:
        options |= {"drop_path_rate": drop_path, "global_pool": {"avg": "avg", "cls": "token"}[pool]}
        options |= {"fc_norm": pool == "avg"}
    try:
        vit = timm.create_model(weights.arch, pretrained=False, **options)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"model.arch={weights.arch}: timm cannot build it for these images: {reason}") from None
    if weights.tensors is not None:
        _fill(vit, weights)
    return vit


def _sizes_in(tensors: dict[str, Tensor]) -> dict[str, int]:
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    return {"patch_size": patch, "embed_dim": width, "depth": depth}


def _fill(vit: nn.Module, weights: Weights) -> None:
    """Load what the checkpoint has; only a new head and its norm may be missing, and only the old norm be left over."""
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(f"model.arch={weights.arch} is a {type(vit).__name__}; weights go into a VisionTransformer")
    try:
        result = vit.load_state_dict(checkpoint_filter_fn(dict(weights.tensors), vit), strict=False)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{weights.name}: does not fit {weights.arch}: {reason}") from None
    missing = [name for name in result.missing_keys if not name.startswith(("head.", "fc_norm."))]
    surplus = [name for name in result.unexpected_keys if not name.startswith("norm.")]
    if missing or surplus:
        which = f"lacks {missing[0]}" if missing else f"has {surplus[0]}, which it has not"
        raise CheckpointError(f"{weights.name}: does not fit {weights.arch}: it {which}")


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
