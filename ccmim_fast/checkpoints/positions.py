"""This file tells the grid of a file's positions and whether there are any, and resamples them to another grid."""

# T tokens, L patches, D width, R rows, C columns of patches

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ccmim_fast.errors import CheckpointError, ConfigError
from ccmim_fast.models.encoder import sincos_positions

Pair = tuple[int, int]


def grid_of_file(
    name: str, patches: int, patch: int, told: tuple[int, ...], likely: Sequence[Pair], setting: str
) -> Pair:
    """Return rows and columns of a file's positions; they are known, or asked for, but never guessed.

    Args:
        name: the file's, for messages.
        patches: the number of positions without those of the prefix.
        patch: side of a patch in pixels.
        told: height and width of the images of training, from the file or the user; empty where nobody tells them.
        likely: heights and widths that are taken where their patches are as many.
        setting: where a user tells them.

    Raises CheckpointError: what the file tells does not fit its positions. ConfigError: nobody tells.
    """
    for height, width in [told] if told else likely:
        rows, columns = height // patch, width // patch
        if rows * columns == patches:
            return rows, columns
    if told:
        raise CheckpointError(
            f"{name}: has positions of {patches} patches; images of {told[0]} x {told[1]} pixels give {rows} x "
            f"{columns}"
        )
    tried = ", ".join(f"{height} x {width}" for height, width in likely)
    raise ConfigError(
        f"{name}: has positions of {patches} patches, and does not tell the size of its images; {tried} pixels do not "
        f"give as many; add {setting}=[H,W]"
    )


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
