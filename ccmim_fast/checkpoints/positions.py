"""This file tells the grid of a file's positions and whether there are any, and resamples them to another grid."""

# T tokens, L patches, D width, R rows, C columns of patches

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ccmim_fast.errors import CheckpointError, ConfigError
from ccmim_fast.models.encoder import sincos_positions

Pair = tuple[int, int]
_PREFIX = ("cls_token", "dist_token", "reg_token")  # in timm's order


def prefix_in(tensors: Mapping[str, Tensor]) -> int:
    """Return how many tokens weights under timm's names have before the patches: [CLS], registers, DeiT's second."""
    return sum(tensors[name].shape[1] for name in _PREFIX if name in tensors and tensors[name].ndim == 3)


def grid_of_file(
    name: str,
    tensors: Mapping[str, Tensor],
    prefixed: bool,
    patch: int,
    told: tuple[int, ...],
    likely: Sequence[Pair],
    squares: Sequence[Pair],
    setting: str,
) -> tuple[int, Pair]:
    """Return how many positions of a file are of its prefix, all or none; and rows and columns of the others.

    Both are known, or asked for, but never guessed.

    Args:
        name: the file's, for messages.
        tensors: its weights under timm's names, positions [1, T, D] among them.
        prefixed: whether the prefix has positions where the number of patches fits both.
        patch: side of a patch in pixels.
        told: height and width of the images of training, from the file or the user; empty where nobody tells them.
        likely: heights and widths that are taken where their patches are as many.
        squares: the same, but where the prefix has positions as `prefixed` says alone.
        setting: where a user tells them.

    Raises CheckpointError: what the file tells does not fit its positions. ConfigError: nobody tells.
    """
    positions, prefix = tensors["pos_embed"].shape[1], prefix_in(tensors)
    first, second = (prefix, 0) if prefixed else (0, prefix)
    asked = [(among, size) for size in ([told] if told else likely) for among in (first, second)]
    for among, (height, width) in asked + [(first, size) for size in squares if not told]:
        rows, columns = height // patch, width // patch
        if rows * columns == positions - among > 0:
            return among, (rows, columns)
    patches = positions - prefix if prefixed else positions
    if told:
        rows, columns = (side // patch for side in told)
        raise CheckpointError(
            f"{name}: has positions of {patches} patches; images of {told[0]} x {told[1]} pixels give {rows} x "
            f"{columns}"
        )
    tried = ", ".join(dict.fromkeys(f"{height} x {width}" for height, width in (*likely, *squares)))
    raise ConfigError(
        f"{name}: has positions of {patches} patches, and does not tell the size of its images; {tried} pixels do not "
        f"give as many; add {setting}=[H,W]"
    )


def with_prefix(tensors: dict[str, Tensor], among: int, wanted: int) -> dict[str, Tensor]:
    """Return weights under timm's names, as the same encoder, whose first `wanted` positions are of the prefix.

    `among` of the file's are. Without positions of its own a token has those of zero, or they are added to it.
    """
    positions_1TD, prefix = tensors["pos_embed"], prefix_in(tensors)
    if among == wanted or among not in (0, prefix) or (wanted and prefix > wanted):
        return tensors
    if wanted:  # a [CLS] that the file lacks stands in front
        zeros_1PD = positions_1TD.new_zeros(1, wanted - among, positions_1TD.shape[2])
        return tensors | {"pos_embed": torch.cat([zeros_1PD, positions_1TD], dim=1)}
    found, start = tensors | {"pos_embed": positions_1TD[:, among:]}, 0
    for name in _PREFIX:
        if name in tensors:
            stop = start + tensors[name].shape[1]
            found[name], start = tensors[name] + positions_1TD[:, start:stop], stop
    return found


def resampled(positions_1TD: Tensor, old: Pair, new: Pair, antialias: bool = True) -> Tensor:
    """Return positions [1, T', D] for another grid by bicubic interpolation, those of the prefix as they are.

    With `antialias` as timm, without it as MAE, BEiT, DINO and ViTDet. The two differ at larger grids too: their cubic
    kernels do (a of -0.5 and -0.75).
    """
    if old == new:
        return positions_1TD
    prefix_1PD, x_1LD = positions_1TD.tensor_split([-math.prod(old)], dim=1)
    x_1DRC = x_1LD.float().unflatten(1, old).permute(0, 3, 1, 2)
    x_1DRC = F.interpolate(x_1DRC, size=new, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([prefix_1PD, x_1DRC.flatten(2).transpose(1, 2).to(x_1LD.dtype)], dim=1)


def of_grid(positions_1TD: Tensor, old: Pair, new: Pair, prefix: int, antialias: bool) -> Tensor:
    """Return positions of another grid: the fixed sine-cosine ones, in any dtype, are computed, others resampled."""
    width = positions_1TD.shape[2]
    if old != new and width % 4 == 0:
        fixed_TD = sincos_positions(width, old, prefix)
        if torch.allclose(positions_1TD[0].float(), fixed_TD, atol=0.01):
            return sincos_positions(width, new, prefix)[None]
    return resampled(positions_1TD, old, new, antialias)


def without_positions(tensors: dict[str, Tensor]) -> str:
    """Say which fixed positions are all zero, behind what was recognised; "": none."""
    found = [name for name in ("encoder.pos_embed", "decoder.pos_embed") if name in tensors and not tensors[name].any()]
    if not found:
        return ""
    cause = "as transformers 5 leaves those of a new ViTMAEForPreTraining: fill them before it is trained"
    return f"; {' and '.join(found)} all zero, so that it knows no places, {cause}"
