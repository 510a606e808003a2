"""This file fits a model to weights from any place: the settings that they tell, and the weights in its own form."""

import contextlib
import json
import math
from typing import Any

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ccmim_fast.checkpoints.convert import to_timm
from ccmim_fast.checkpoints.obstacles import obstacle
from ccmim_fast.checkpoints.positions import grid_of_file, of_grid, prefix_in, with_prefix
from ccmim_fast.checkpoints.published import Weights, known_arch, named, timm_size
from ccmim_fast.checkpoints.told import check_form
from ccmim_fast.errors import CheckpointError, one_line
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.encoder import own_encoder
from ccmim_fast.models.parts import parts_in, settings_of

_CLS, _POSITIONS = "encoder.cls_token", "encoder.pos_embed"
_NEW = ("decoder", "projector", "predictor")  # parts that a file may lack as a whole: they start anew


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
        said = "; ".join(f"{words}: {named(keys)}" for words, keys in wrong.items() if keys)
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
