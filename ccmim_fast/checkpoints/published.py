"""Published weights: files of timm, MAE, the authors' ccMIM and our exports, and what timm downloads by name."""

import json
import math
from typing import NamedTuple

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ccmim_fast.checkpoints.convert import from_flat, read_flat_file
from ccmim_fast.config.keys import nearest
from ccmim_fast.errors import CheckpointError, ConfigError
from ccmim_fast.models.ccmim import CCMIM

_NEW = ("decoder", "projector", "predictor")  # parts that a file may lack as a whole: they start anew
_SHOWN = 4  # names in one line
TIMM = "timm:"  # in front of a name of timm's
_ASSUMED = "vit_base_patch16_224"
_OF_WIDTH = {  # timm's, by width: what to propose; patch and blocks are read off the weights
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
    1408: "vit_giant_patch14_224",
    1664: "vit_gigantic_patch14_224",
}


class Published(NamedTuple):
    """What a file tells.

    Attributes:
        tensors: under our names; a classifier (`head`) of timm's is left out.
        arch: timm's name; empty where it does not tell.
        num_heads: of attention; 0 where it does not tell, or they are the architecture's own.
        mean, std: of the images it was trained on, per channel; empty where it does not tell.
        image_size: height and width of those images in pixels; empty where it does not tell.
    """

    tensors: dict[str, Tensor]
    arch: str = ""
    num_heads: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    image_size: tuple[int, ...] = ()


def read_published(name: str) -> Published:
    """Read weights; no code in a file is run.

    Args:
        name: a file `.safetensors`, or `.pth`, `.pt`, `.bin`; or `timm:ARCH.TAG`, from timm's cache or the Hugging Face
            hub.

    Raises:
        CheckpointError: missing, damaged, no dictionary of tensors, or not to be downloaded.
        ConfigError: a name that timm does not know.
    """
    if name.startswith(TIMM):
        return _downloaded(name)
    about = {}
    if name.endswith(".safetensors"):
        try:
            with safe_open(name, "pt") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                about = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{name}: cannot be read as weights: {' '.join(str(error).split())[:200]}") from None
    else:
        found = read_flat_file(name)
        for key in ("model", "state_dict"):
            found = found[key] if isinstance(found.get(key), dict) else found
    if not found or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()):
        raise CheckpointError(f"{name}: holds no plain dictionary of tensors")
    return Published(_renamed(found), *_told(about, name))


def known_arch(arch: str) -> str:
    """The name, if timm knows such an architecture. Raises ConfigError naming the nearest."""
    if not timm.is_model(arch) or "." in arch:
        names = timm.list_models("*vit*") + timm.list_models("*deit*")
        raise ConfigError(f"model.arch={arch!r:.80}: no model of timm; nearest is {nearest(arch, names)}")
    return arch


def assumed_arch(of: Published, name: str, num_heads: int) -> str:
    """The architecture of weights of which nobody tells it: vit_base_patch16_224.

    Args:
        num_heads: what the user tells; 0: nothing.

    Raises:
        ConfigError: another width, and nobody tells the heads, of which any number that divides the width would load.
    """
    kernel = of.tensors.get("encoder.patch_embed.proj.weight")
    width = 0 if kernel is None or kernel.ndim != 4 else len(kernel)
    if width and _OF_WIDTH.get(width) != _ASSUMED and not (num_heads or of.num_heads):
        near = _OF_WIDTH[min(_OF_WIDTH, key=lambda known: abs(known - width))]
        raise ConfigError(
            f"{name}: does not tell its architecture and is {width} wide, which {_ASSUMED} is not; add "
            f"--model.arch=NAME or --model.num_heads=N; nearest is --model.arch={near}"
        )
    return _ASSUMED


def derived(of: Published, given: list[str]) -> list[str]:
    """Settings that the weights tell, as options: sizes, and the method where no file of settings is given.

    Raises:
        ConfigError: timm does not know the architecture.
    """
    weights, arch = of.tensors, of.arch
    try:
        with torch.device("meta"):
            own = timm.create_model(arch, num_classes=0, class_token=True, global_pool="token")
    except Exception as error:  # whatever timm raises on a name or class that is none of these
        raise ConfigError(f"--arch={arch!r:.80}: {' '.join(str(error).split())[:200]}") from None
    found: dict[str, object] = {"model.arch": arch}
    found |= {"model.num_heads": of.num_heads} if of.num_heads else {}
    found |= {"data.mean": list(of.mean), "data.std": list(of.std)} if of.mean and of.std else {}
    kernel = weights.get("encoder.patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4:
        dim, channels, patch, _ = kernel.shape
        told = {"patch_size": patch, "embed_dim": dim, "depth": _blocks(weights, "encoder.blocks.")}
        owned = {"patch_size": own.patch_embed.patch_size[0], "embed_dim": own.embed_dim, "depth": len(own.blocks)}
        # Only what differs: a run that goes on from here is compared setting by setting.
        found |= {f"model.{key}": value for key, value in told.items() if value != owned[key]}
        found |= {"data.channels": channels} if channels != 3 else {}
        positions = weights.get("encoder.pos_embed")
        if positions is not None and positions.ndim == 3:
            side = math.isqrt(positions.shape[1] - (0 if own.no_embed_class else own.num_prefix_tokens))
            height, width = of.image_size or (side * patch, side * patch)
            found["data.image_size"] = f"[{height},{width}]"
    if "decoder.embed.weight" in weights:
        found["decoder.dim"] = len(weights["decoder.embed.weight"])
        found["decoder.depth"] = _blocks(weights, "decoder.blocks.")
    if "projector.3.weight" in weights:
        found["heads.dim"] = len(weights["projector.3.weight"])
    if not any(option.startswith("--config") for option in given):
        found |= _method(weights)
    return [f"--{key}={value}" for key, value in found.items()]


def fill_(model: CCMIM, weights: dict[str, Tensor], name: str) -> list[str]:
    """Load strictly; returns the parts that `weights` lack as a whole, which stay as they are.

    Raises:
        CheckpointError: one line with the names that are missing, unexpected, or of another shape.
    """
    own = model.state_dict()
    new = [part for part in _NEW if hasattr(model, part) and not any(key.startswith(f"{part}.") for key in weights)]
    kept = {key: value for key, value in own.items() if key.partition(".")[0] in new}
    shared = weights.keys() & own.keys()
    wrong = {
        "missing": own.keys() - weights.keys() - kept.keys(),
        "unexpected": weights.keys() - own.keys(),
        "of another shape": {key for key in shared if own[key].shape != weights[key].shape},
    }
    if any(wrong.values()):
        said = "; ".join(f"{words}: {_named(keys)}" for words, keys in wrong.items() if keys)
        raise CheckpointError(f"{name}: not the weights of this model: {said}")
    model.load_state_dict(weights | kept)
    return new


def _method(weights: dict[str, Tensor]) -> dict[str, str]:
    parts = {name.partition(".")[0] for name in weights}
    if "predictor" in parts:
        return {"contrast.loss": "align"}
    if "decoder" in parts and "projector" not in parts:
        return {"contrast.loss": "none", "mask.strategy": "random"}  # MAE
    return {}


def _blocks(weights: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})


def _named(keys: set[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _downloaded(name: str) -> Published:
    """The weights of a tag, loaded strictly by timm, and what it says of their images."""
    tagged = name.removeprefix(TIMM)
    arch = known_arch(tagged.partition(".")[0])
    tags = timm.list_pretrained(f"{arch}.*")
    if tagged not in tags:
        near = f"nearest: {TIMM}{nearest(tagged, tags)}" if tags else f"{TIMM}{arch} has initial weights"
        raise ConfigError(f"{name!r:.100}: timm has no such weights; {near}")
    try:
        vit = timm.create_model(tagged, pretrained=True)
    except Exception as error:  # whatever hub, network and files lead to
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{name}: timm cannot load it: {reason}; without a network, name a file") from None
    said = vit.pretrained_cfg
    return Published(_renamed(vit.state_dict()), arch, 0, tuple(said["mean"]), tuple(said["std"]))


def _renamed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = found if any(name.startswith("encoder.") for name in found) else from_flat(found)
    return {name: value for name, value in ours.items() if not name.startswith("encoder.head.")}


def _told(about: dict[str, str], name: str) -> tuple[str, int, tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
    """What a `Published` has behind its tensors, of the texts in a .safetensors as `ccmim export` writes them."""
    try:
        arguments = json.loads(about.get("timm_arguments", "{}"))
        heads, size = int(arguments.get("num_heads", 0)), tuple(map(int, arguments.get("img_size", ())))
        mean, std = (tuple(map(float, json.loads(about.get(key, "[]")))) for key in ("mean", "std"))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise CheckpointError(
            f"{name}: what it tells of itself is damaged; expected what ccmim export writes"
        ) from None
    return about.get("arch", ""), heads, mean, std, size
