"""This file reads weights from any place: a run, a file (timm, MAE, ccMIM, `ccmim export`), or a name of timm's."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ccmim_fast.checkpoints.claims import check_claims, check_size
from ccmim_fast.checkpoints.convert import to_timm
from ccmim_fast.checkpoints.eva import ANCHORS, likely_arch
from ccmim_fast.checkpoints.layouts import as_architecture, recognised
from ccmim_fast.checkpoints.obstacles import obstacle
from ccmim_fast.checkpoints.positions import grid_of_file, of_grid, prefix_in, with_prefix, without_positions
from ccmim_fast.checkpoints.run import open_run
from ccmim_fast.checkpoints.told import OF_WIDTH, check_form, notes
from ccmim_fast.checkpoints.weight_files import is_model_folder, read_file, read_folder
from ccmim_fast.config.keys import nearest
from ccmim_fast.config.validate import check_tag
from ccmim_fast.errors import CheckpointError, ConfigError, one_line
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.encoder import own_encoder, timms_own
from ccmim_fast.models.parts import parts_in, settings_of

TIMM = "timm:"  # in front of a name of timm's
_CLS, _POSITIONS = "encoder.cls_token", "encoder.pos_embed"
_NEW = ("decoder", "projector", "predictor")  # parts that a file may lack as a whole: they start anew
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
        return Weights(str(run.path), run.weights, *told, layer_scale=model.layer_scale, positions=positions, mlp=mlp)
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
        raise CheckpointError(f"{place}: not finite: {_named(set(wrong))}")
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


def derived(of: Weights, given: list[str]) -> list[str]:
    """Return the settings that weights of a known architecture tell, as options; ConfigError if timm cannot build it.

    The method is derived where no file of settings is among `given`, the options of the user.
    """
    # What a file tells may be the name of a place that timm would ask, such as hf-hub:OWNER/NAME.
    weights, found = of.tensors, {"model.arch": known_arch(of.arch, "--arch")}
    if not weights:
        return [f"--model.arch={of.arch}"]
    found |= {"model.num_heads": of.num_heads} if of.num_heads else {}
    found |= {"data.mean": list(of.mean), "data.std": list(of.std)} if of.mean and of.std else {}
    found |= {"data.max_value": list(of.max_value)} if of.max_value else {}
    found |= _of_encoder(of, own_encoder(of.arch), _image_size(given))
    if "decoder.embed.weight" in weights:
        found["decoder.dim"] = len(weights["decoder.embed.weight"])
        found["decoder.depth"] = _blocks(weights, "decoder.blocks.")
        found |= dict(of.settings)
    if "projector.3.weight" in weights:
        found["heads.dim"] = len(weights["projector.3.weight"])
    if not any(option.startswith("--config") for option in given):
        parts = {name.partition(".")[0] for name in weights}
        if "predictor" in parts:
            found["contrast.loss"] = "align"
        elif "decoder" in parts and "projector" not in parts:
            found |= {"contrast.loss": "none", "mask.strategy": "random"}  # MAE
    return [f"--{key}={value}" for key, value in found.items()]


def _of_encoder(of: Weights, own: VisionTransformer | Eva, images: tuple[int, ...]) -> dict[str, Any]:
    """Return the settings that the weights of an encoder tell, and its architecture `own` does not.

    `images` are height and width in pixels, empty where the user does not say them. Only what differs is a setting: a
    run that goes on from here is compared setting by setting.
    """
    weights = of.tensors
    kernel = weights.get("encoder.patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 4:
        return {}
    dim, channels, patch, _ = kernel.shape
    told = {"patch_size": patch, "embed_dim": dim, "depth": _blocks(weights, "encoder.blocks.")}
    owned = {"patch_size": own.patch_embed.patch_size[0], "embed_dim": own.embed_dim, "depth": len(own.blocks)}
    model = {key: value for key, value in told.items() if value != owned[key]}
    model |= settings_of(parts_in(to_timm(weights), own, of.mlp), of.layer_scale)
    model |= {"positions": of.positions} if of.positions else {}
    found: dict[str, Any] = {f"model.{key}": value for key, value in model.items()}
    found |= {"data.channels": channels} if channels != 3 else {}
    size = _size_told(of, own, patch, images)
    return found | ({"data.image_size": list(size)} if size else {})


def _size_told(of: Weights, own: VisionTransformer | Eva, patch: int, images: tuple[int, ...]) -> tuple[int, ...]:
    """Return height and width in pixels of the images that weights were trained on; empty where nothing tells them.

    An encoder with rotary positions alone has no other trace of them than what its file says.
    """
    positions_1TD = of.tensors.get(_POSITIONS)
    if positions_1TD is not None and positions_1TD.ndim == 3:
        _, (rows, columns) = _grid(of, to_timm(of.tensors), not own.no_embed_class, patch, images)
        return rows * patch, columns * patch
    return of.image_size if own.pos_embed is None or of.positions == "rope" else ()


def fill_(model: CCMIM, of: Weights, antialias: bool = True) -> list[str]:
    """Load weights strictly; return the parts of the model that they lack as a whole, which stay as they are.

    Positions become those of the model's grid (for `antialias` see `positions.resampled`), a norm behind pooling that
    of every token. Raises CheckpointError naming what is missing, unexpected, or of another shape.
    """
    check_form(model.encoder, of, of.arch, of.name)
    own, weights = model.state_dict(), _fitted(model, of, antialias)
    owned, given = ({name.partition(".")[0] for name in of} for of in (own, weights))
    new = [part for part in _NEW if part in owned - given]
    if _CLS not in weights:
        new.append(_CLS)
    kept = {key: value for key, value in own.items() if key.partition(".")[0] in new or key in new}
    wrong = {
        "missing": own.keys() - weights.keys() - kept.keys(),
        "unexpected": weights.keys() - own.keys(),
        "of another shape": {key for key in weights.keys() & own.keys() if own[key].shape != weights[key].shape},
    }
    if any(wrong.values()):
        said = "; ".join(f"{words}: {_named(keys)}" for words, keys in wrong.items() if keys)
        reason = obstacle(own, weights)
        raise CheckpointError(f"{of.name}: not the weights of this model: {reason}{said}")
    try:
        model.load_state_dict(weights | kept)
    except (RuntimeError, TypeError, NotImplementedError) as error:  # a dtype or layout that does not become float32
        raise CheckpointError(f"{of.name}: not the weights of this model: {one_line(error)}") from None
    return new


def _fitted(model: CCMIM, of: Weights, antialias: bool) -> dict[str, Tensor]:
    """Return the weights with positions of the model's grid, and their last norm where the model has it."""
    weights, own = dict(of.tensors), model.state_dict()
    if "encoder.norm.weight" not in weights:
        weights = {name.replace("encoder.fc_norm.", "encoder.norm."): value for name, value in weights.items()}
    positions_1TD, mine_1TD = weights.get(_POSITIONS), own.get(_POSITIONS)
    if positions_1TD is None or mine_1TD is None or (positions_1TD.shape == mine_1TD.shape and not of.image_size):
        return weights
    if positions_1TD.ndim != 3 or positions_1TD.shape[2] != mine_1TD.shape[2]:
        return weights  # of another shape, as is said
    prefix, tensors = mine_1TD.shape[1] - math.prod(model.grid), to_timm(weights)
    if prefix and prefix != (told := prefix_in(tensors)) and (_CLS in weights or told > prefix):
        return weights  # with other tokens than the model, as is said
    images = tuple(side * model.patch for side in model.grid)
    among, old = _grid(of, tensors, prefix > 0, model.patch, images)
    tensors = with_prefix(tensors, among, prefix)
    tensors["pos_embed"] = of_grid(tensors["pos_embed"], old, model.grid, prefix, antialias)
    weights |= {f"encoder.{name}": value for name, value in tensors.items()}
    if "decoder.pos_embed" in weights:
        weights["decoder.pos_embed"] = own["decoder.pos_embed"]  # computed from the grid
    return weights


def _grid(
    of: Weights, tensors: dict[str, Tensor], prefixed: bool, patch: int, images: tuple[int, ...]
) -> tuple[int, tuple[int, int]]:
    """Return the prefix and the grid of positions, see `grid_of_file`; `ccmim import` says the size."""
    likely = [timm_size(of.arch), *([images] if len(images) == 2 else [])]
    patches = max(tensors["pos_embed"].shape[1] - prefix_in(tensors) * prefixed, 0)
    squares = [(math.isqrt(patches) * patch,) * 2]
    return grid_of_file(of.name, tensors, prefixed, patch, of.image_size, likely, squares, "--data.image_size")


def _image_size(given: list[str]) -> tuple[int, ...]:
    """Return the size of images that is among the user's options; empty without one."""
    for option in reversed(given):
        name, _, value = option.partition("=")
        if name == "--data.image_size":
            with contextlib.suppress(ValueError, TypeError):  # the parser says what is wrong
                return tuple(map(int, json.loads(value)))
    return ()


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
    return Weights(name, recognised(vit.state_dict(), name)[0], arch, 0, tuple(said["mean"]), tuple(said["std"]))
