"""This file reads weights from any place: a run, a file (timm, MAE, ccMIM, `ccmim export`), or a name of timm's."""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ccmim_fast.checkpoints.claims import check_claims, check_size
from ccmim_fast.checkpoints.convert import from_flat
from ccmim_fast.checkpoints.run import open_run
from ccmim_fast.config.keys import nearest
from ccmim_fast.errors import CheckpointError, ConfigError, one_line
from ccmim_fast.models.ccmim import CCMIM

TIMM = "timm:"  # in front of a name of timm's
_NEW = ("decoder", "projector", "predictor")  # parts that a file may lack as a whole: they start anew
_SHOWN = 4  # names in one line
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


class Weights(NamedTuple):
    """This tuple holds weights and what their place tells of them; what it does not tell is empty, 0 or None."""

    name: str  # the place, for people
    tensors: dict[str, Tensor]  # by our names, without timm's classifier; none for the initial weights of `arch`
    arch: str = ""  # timm's name
    num_heads: int = 0  # of attention; 0 as well where they are the architecture's own
    mean: tuple[float, ...] = ()  # of the images they were trained on, per channel
    std: tuple[float, ...] = ()
    image_size: tuple[int, ...] = ()  # height and width of those images in pixels
    step: int | None = None  # optimizer steps of pretraining
    max_value: tuple[float, ...] = ()  # the number that was white in those images; see `data.max_value`


def read_weights(place: str) -> Weights:
    """Read weights; no code in a file is run.

    Args:
        place: folder of a run or of one of its checkpoints (averaged weights where there are some); a file
            `.safetensors`, or `.pth`, `.pt`, `.bin`; `timm:ARCH.TAG`, from timm's cache or the Hugging Face hub;
            `timm:ARCH` for initial weights.

    Raises:
        CheckpointError: missing, damaged, no dictionary of tensors, or not to be downloaded.
        ConfigError: a name that timm does not know.
    """
    if place.startswith(TIMM):
        return _timms(place) if "." in place else Weights(place, {}, known_arch(place.removeprefix(TIMM)))
    if Path(place).is_dir():
        run = open_run(place)
        model, data = run.config.model, run.config.data
        told = (model.arch, model.num_heads, data.mean, data.std, data.image_size, run.step, data.max_value)
        return Weights(str(run.path), run.weights, *told)
    if Path(place).exists() and not Path(place).is_file():
        raise CheckpointError(f"{place}: cannot be read as weights: it is no file")  # opening a FIFO would wait
    found, about = _safetensors(place) if place.endswith(".safetensors") else (_pickled(place), {})
    if not found or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()):
        raise CheckpointError(f"{place}: holds no plain dictionary of tensors")
    weights = Weights(place, _renamed(found), **_told(about, place))
    check_claims(weights.tensors, place)
    check_size(weights.image_size, len(weights.mean), weights.tensors, place)
    return weights


def known_arch(arch: str, key: str = "model.arch") -> str:
    """Return the name if timm knows such an architecture; raise ConfigError naming the nearest if not."""
    if not timm.is_model(arch) or "." in arch:
        names = timm.list_models("*vit*") + timm.list_models("*deit*")
        raise ConfigError(f"{key}={arch!r:.80}: no model of timm; nearest is {nearest(arch, names)}")
    return arch


def with_arch(of: Weights, arch: str = "", num_heads: int = 0) -> Weights:
    """Return the weights with their architecture: the user's, else what their place tells, else vit_base_patch16_224.

    Raises:
        ConfigError: timm does not know the architecture; or nobody tells it, the width is another than that of
            vit_base_patch16_224, and nobody tells the heads, of which any number that divides the width would load.
    """
    if of.name.startswith(TIMM):
        return of
    if arch := arch or of.arch:
        return of._replace(arch=known_arch(arch))
    kernel = of.tensors.get("encoder.patch_embed.proj.weight")
    width = 0 if kernel is None or kernel.ndim != 4 else len(kernel)
    if width and _OF_WIDTH.get(width) != _ASSUMED and not (num_heads or of.num_heads):
        near = _OF_WIDTH[min(_OF_WIDTH, key=lambda known: abs(known - width))]
        raise ConfigError(
            f"{of.name}: does not tell its architecture and is {width} wide, which {_ASSUMED} is not; add "
            f"--model.arch=NAME or --model.num_heads=N; nearest is --model.arch={near}"
        )
    return of._replace(arch=_ASSUMED)


def derived(of: Weights, given: list[str]) -> list[str]:
    """Return the settings that weights of a known architecture tell, as options; ConfigError if timm cannot build it.

    The method is derived where no file of settings is among `given`, the options of the user.
    """
    # What a file tells may be the name of a place that timm would ask, such as hf-hub:OWNER/NAME.
    weights, found = of.tensors, {"model.arch": known_arch(of.arch, "--arch")}
    if not weights:
        return [f"--model.arch={of.arch}"]
    try:
        with torch.device("meta"):
            own = timm.create_model(of.arch, num_classes=0, class_token=True, global_pool="token")
    except Exception as error:  # whatever timm raises on a name or class that is none of these
        raise ConfigError(f"--arch={of.arch!r:.80}: {one_line(error)}") from None
    found |= {"model.num_heads": of.num_heads} if of.num_heads else {}
    found |= {"data.mean": list(of.mean), "data.std": list(of.std)} if of.mean and of.std else {}
    found |= {"data.max_value": list(of.max_value)} if of.max_value else {}
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
        parts = {name.partition(".")[0] for name in weights}
        if "predictor" in parts:
            found["contrast.loss"] = "align"
        elif "decoder" in parts and "projector" not in parts:
            found |= {"contrast.loss": "none", "mask.strategy": "random"}  # MAE
    return [f"--{key}={value}" for key, value in found.items()]


def fill_(model: CCMIM, of: Weights) -> list[str]:
    """Load weights strictly; return the parts of the model that they lack as a whole, which stay as they are.

    Raises CheckpointError naming what is missing, unexpected, or of another shape.
    """
    own, weights = model.state_dict(), of.tensors
    owned, given = ({name.partition(".")[0] for name in of} for of in (own, weights))
    new = [part for part in _NEW if part in owned - given]
    kept = {key: value for key, value in own.items() if key.partition(".")[0] in new}
    wrong = {
        "missing": own.keys() - weights.keys() - kept.keys(),
        "unexpected": weights.keys() - own.keys(),
        "of another shape": {key for key in weights.keys() & own.keys() if own[key].shape != weights[key].shape},
    }
    if any(wrong.values()):
        said = "; ".join(f"{words}: {_named(keys)}" for words, keys in wrong.items() if keys)
        raise CheckpointError(f"{of.name}: not the weights of this model: {said}")
    try:
        model.load_state_dict(weights | kept)
    except (RuntimeError, TypeError, NotImplementedError) as error:  # a dtype or layout that does not become float32
        raise CheckpointError(f"{of.name}: not the weights of this model: {one_line(error)}") from None
    return new


def _blocks(weights: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})


def _named(keys: set[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _timms(name: str) -> Weights:
    """Have timm download the weights of a tag and load them strictly; it tells the mean and std of their images."""
    tagged = name.removeprefix(TIMM)
    arch = known_arch(tagged.partition(".")[0])
    tags = timm.list_pretrained(f"{arch}.*")
    if tagged not in tags:
        near = f"nearest: {TIMM}{nearest(tagged, tags)}" if tags else f"{TIMM}{arch} has initial weights"
        raise ConfigError(f"{name!r:.100}: timm has no such weights; {near}")
    try:
        vit = timm.create_model(tagged, pretrained=True)
    except Exception as error:  # whatever hub, network and files lead to
        reason = one_line(error)
        raise CheckpointError(f"{name}: timm cannot load it: {reason}; without a network, name a file") from None
    said = vit.pretrained_cfg
    return Weights(name, _renamed(vit.state_dict()), arch, 0, tuple(said["mean"]), tuple(said["std"]))


def _safetensors(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(name, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{name}: cannot be read as weights: {one_line(error)}") from None


def _pickled(name: str) -> dict[str, Any]:
    """Read a `.pth` file; only tensors and plain containers are accepted, code in it never runs."""
    try:
        # MAE's training checkpoints carry their command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(name, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds on damaged input
        raise CheckpointError(f"{name}: cannot be read as weights: {one_line(error)}") from None
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    return found if isinstance(found, dict) else {}


def _renamed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = found if any(name.startswith("encoder.") for name in found) else from_flat(found)
    return {name: value for name, value in ours.items() if not name.startswith("encoder.head.")}


def _told(about: dict[str, str], name: str) -> dict[str, Any]:
    """Return the fields of `Weights` from `arch` on, by name, from the texts that `ccmim export` writes."""
    try:
        arguments = json.loads(about.get("timm_arguments", "{}"))
        heads, size = int(arguments.get("num_heads", 0)), tuple(map(int, arguments.get("img_size", ())))
        if len(size) not in (0, 2):
            raise ValueError(size)
        told = {key: tuple(map(float, json.loads(about.get(key, "[]")))) for key in ("mean", "std", "max_value")}
        if min(told["max_value"], default=1) <= 0:
            raise ValueError(told["max_value"])
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise CheckpointError(
            f"{name}: what it tells of itself is damaged; expected what ccmim export writes"
        ) from None
    return {"arch": about.get("arch", ""), "num_heads": heads, "image_size": size, **told}
