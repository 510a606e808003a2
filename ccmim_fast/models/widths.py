"""A width is refused that an encoder's heads, positions or MLP do not fit, with the nearest that they do."""

import itertools
import math
from collections.abc import Callable

from timm.layers import GluMlp
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from ccmim_fast.errors import ConfigError
from ccmim_fast.models.parts import mlp_of, ratio
from ccmim_fast.models.tokens import attention_of

_AXES = 4  # sine and cosine of rows and columns


def check_width(
    own: VisionTransformer | Eva, arch: str, *, embed_dim: int, num_heads: int, positions: str, mlp: str
) -> None:
    """Refuse settings of the section `model` that give a width which timm, or our positions, cannot be built with.

    `own` is the architecture `arch` as timm has it; 0 stands for its own width and heads. Raises ConfigError, which
    names the nearest width, or number of heads, that can be.
    """
    width, heads = embed_dim or own.embed_dim, num_heads or attention_of(own).num_heads
    unit = _unit(own, heads, positions)

    def hidden(width: int) -> int:
        """Return how many channels the MLP has with its gates, 0 without."""
        part = mlp_of(own)
        if mlp != "own" or not isinstance(own, VisionTransformer) or not isinstance(part, GluMlp):
            return 0
        return int(width * ratio(part.fc1.out_features, own.embed_dim))

    def fits(width: int) -> bool:
        return hidden(width) % 2 == 0

    fitting = [n for n in range(1, width + 1) if width % _unit(own, n, positions) == 0]
    if num_heads and width % heads and fitting and fits(width):
        near = min(fitting, key=lambda n: abs(n - heads))
        raise ConfigError(f"model.num_heads={heads} must divide the width {width}; nearest: {near}")
    if width % unit:
        near = _nearest(width, unit, fits)
        raise ConfigError(f"model.embed_dim={width} must be a multiple of {unit} ({heads} heads); nearest: {near}")
    if not fits(width):
        raise ConfigError(
            f"model.embed_dim={width}: the MLP of {arch} has gates for half of its channels, of which there would be "
            f"{hidden(width)}; nearest: {_nearest(width, unit, fits)}"
        )


def _unit(own: VisionTransformer | Eva, heads: int, positions: str) -> int:
    """Return the number whose multiples a width must be."""
    if positions == "rope" or getattr(own, "rope", None) is not None:
        return _AXES * heads  # the rotations are of each head
    part = attention_of(own)
    # Differential attention divides a head in two.
    unit = heads * max(1, own.embed_dim // (part.num_heads * part.head_dim))
    return math.lcm(unit, _AXES) if positions == "sincos" else unit


def _nearest(width: int, unit: int, fits: Callable[[int], bool]) -> int:
    """Return the positive multiple of `unit` nearest to `width` that fits."""
    first = width // unit
    pairs = ((first - step, first + 1 + step) for step in itertools.count())
    found = next(f for pair in pairs if (f := [n * unit for n in pair if n > 0 and fits(n * unit)]))
    return min(found, key=lambda other: abs(other - width))
