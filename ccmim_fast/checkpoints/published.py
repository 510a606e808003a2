"""This file reads weights from any place: a run, a file (timm, MAE, ccMIM, `ccmim export`), or a name of timm's."""

from pathlib import Path
from typing import Any, NamedTuple

import timm
from torch import Tensor

from ccmim_fast.checkpoints.claims import check_claims, check_size
from ccmim_fast.checkpoints.eva import ANCHORS, likely_arch
from ccmim_fast.checkpoints.layouts import as_architecture, recognised
from ccmim_fast.checkpoints.positions import without_positions
from ccmim_fast.checkpoints.run import open_run
from ccmim_fast.checkpoints.told import OF_WIDTH, notes
from ccmim_fast.checkpoints.weight_files import is_model_folder, read_file, read_folder
from ccmim_fast.config.keys import nearest
from ccmim_fast.config.validate import check_tag
from ccmim_fast.errors import CheckpointError, ConfigError, one_line
from ccmim_fast.models.encoder import timms_own

TIMM = "timm:"  # in front of a name of timm's
_SHOWN = 4  # names in one line
_ASSUMED = "vit_base_patch16_224"


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
    layout: str = ""  # what was recognised in a file, in words
    layer_scale: float = 0.0  # the initial one, which no weight tells
    positions: str = ""  # as the setting `model.positions`, where it is not the default
    mlp: str = ""  # as the setting `model.mlp`, where it is not the default: no weight tells an activation
    mask_ratio: float = 0.0  # of pretraining
    # Of config.json beside the weights: what `told.check_form` compares with the encoder that is built for them.
    activation: str = ""
    eps: float = 0.0  # of the norms
    rope_base: float = 0.0  # of rotary positions
    settings: tuple[tuple[str, Any], ...] = ()  # of a decoder and its target
    unread: str = ""


def read_weights(place: str, arch: str = "") -> Weights:
    """Read weights; no code in a file is run.

    Args:
        place: folder of a run or of one of its checkpoints (averaged weights where there are some), or one that
            transformers or timm wrote; a file `.safetensors`, or `.pth`, `.pt`, `.bin`, see `layouts`; `timm:ARCH.TAG`,
            from timm's cache or the Hugging Face hub; `timm:ARCH` for initial weights.
        arch: timm's name in place of what a file or folder tells; a run and `timm:` have their own.

    Raises:
        CheckpointError: missing, damaged, of a layout that is not known, or not to be downloaded.
        ConfigError: a name that timm does not know.
    """
    if place.startswith(TIMM):
        return _timms(place) if "." in place else Weights(place, {}, known_arch(place.removeprefix(TIMM)))
    if is_run(place):
        run = open_run(place)
        model, data = run.config.model, run.config.data
        told = (model.arch, model.num_heads, data.mean, data.std, data.image_size, run.step, data.max_value)
        positions, mlp = "" if model.positions == "sincos" else model.positions, "" if model.mlp == "own" else model.mlp
        form = {"layer_scale": model.layer_scale, "positions": positions, "mlp": mlp}
        return Weights(str(run.path), run.weights, *told, **form, mask_ratio=run.config.mask.ratio)
    if Path(place).is_dir():
        found, told = read_folder(Path(place))
    elif Path(place).exists() and not Path(place).is_file():
        raise CheckpointError(f"{place}: cannot be read as weights: it is no file")  # opening a FIFO would wait
    else:
        found, told = read_file(place)
    tensors, layout = recognised(found, place)
    check_claims(tensors, place)
    check_size(told.image_size, len(told.mean), tensors, place)
    if wrong := [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise CheckpointError(f"{place}: not finite: {named(set(wrong))}")
    told = told._replace(arch=arch or told.arch or likely_arch(tensors, told.num_heads))
    tensors, added = as_architecture(tensors, told.arch)
    layout += added + without_positions(tensors) + notes(told, told.arch)
    return Weights(place, tensors, **told._asdict(), layout=layout)


def known_arch(arch: str, key: str = "model.arch") -> str:
    """Return the name if timm knows such an architecture; raise ConfigError naming the nearest if not."""
    if not timm.is_model(arch):
        names = timm.list_models("*vit*") + timm.list_models("*deit*")
        raise ConfigError(f"{key}={arch!r:.80}: no model of timm; nearest is {nearest(arch, names)}")
    check_tag(key, arch)
    return arch


def is_run(place: str) -> bool:
    """Tell whether a place is taken for a run or a checkpoint of one: a folder that no other library wrote."""
    return Path(place).is_dir() and not is_model_folder(Path(place))


def timm_size(arch: str) -> tuple[int, int]:
    """Return height and width in pixels of the images that timm builds an architecture for."""
    return timms_own(arch).patch_embed.img_size


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
    if any(f"encoder.{anchor}" in of.tensors for anchor in ANCHORS):
        raise ConfigError(
            f"{of.name}: does not tell its architecture, which is of timm's Eva family; add --model.arch=NAME"
        )
    if width and OF_WIDTH.get(width) != _ASSUMED and not (num_heads or of.num_heads):
        near = OF_WIDTH[min(OF_WIDTH, key=lambda known: abs(known - width))]
        raise ConfigError(
            f"{of.name}: does not tell its architecture and is {width} wide, which {_ASSUMED} is not; add "
            f"--model.arch=NAME or --model.num_heads=N; nearest is --model.arch={near}"
        )
    return of._replace(arch=_ASSUMED)


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
    return Weights(name, recognised(vit.state_dict(), name)[0], arch, 0, tuple(said["mean"]), tuple(said["std"]))


def named(keys: set[str]) -> str:
    """Return names of weights for one line: the first few, and how many more."""
    names = sorted(keys)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
