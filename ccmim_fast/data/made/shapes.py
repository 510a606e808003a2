"""This module generates images with exact labels, masks and boxes: one textured shape in front of a background.

The label is the shape. Background, colours, texture, position, size and rotation are drawn independently of the label.
"""

# H height, W width, h w the object's window, S subpixels per side

from collections import namedtuple

import numpy as np

from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.made.base import PURPOSE_NOISE, GeneratedSource
from ccmim_fast.errors import ConfigError

_VERSION = 2  # of the pictures: raise it when the same parameters give another picture, or old caches stay in use
_SUBPIXELS = 3  # S; 10 grey levels along an edge
_SMALLEST = 8  # pixels per side; the object is half of that
_PALETTES = np.array(  # two tones each: sky, sand, meadow, slate
    [
        [[70, 130, 200], [205, 225, 245]],
        [[160, 115, 70], [240, 215, 170]],
        [[40, 95, 45], [165, 205, 120]],
        [[50, 55, 70], [150, 155, 165]],
    ],
    dtype=np.float64,
)
# The random numbers of one image, each uniform in (0, 1)
_Parameters = namedtuple("_Parameters", "radius y x rotation red green blue texture frequency phase palette direction")


class ShapesSource(GeneratedSource):
    """This source draws one of `classes` shapes; see `GeneratedSource`. The cache takes 16 KB an image at 64 x 64.

    `background`: `plain`, a gradient between two tones, or `textured`, 1/f noise between them. Raises ConfigError for
    images that are too small.
    """

    noun = "shape"

    def __init__(
        self,
        seed: int,
        samples: int,
        image_size: tuple[int, int],
        classes: int = 6,
        background: str = "plain",
        cache_dir: str | None = None,
    ):
        if min(image_size) < _SMALLEST:
            raise ConfigError(f"data.image_size={image_size} must be at least {_SMALLEST} each for data.source=shapes")
        self._background = background
        size = f"{image_size[0]}x{image_size[1]}"
        fingerprint = f"shapes-v{_VERSION}-seed{seed}-n{samples}-{size}-k{classes}-{background}"
        fields = [("mask", np.bool_, image_size)]
        super().__init__(seed, samples, image_size, tuple(_SHAPES)[:classes], fingerprint, cache_dir, fields)

    def mask(self, index: int) -> np.ndarray:
        """Return the pixels that the object covers at least in part, [H, W] bool; the others show the background."""
        return self._record(index)[1]

    def box(self, index: int) -> tuple[int, int, int, int]:
        """Return the mask's bounds in pixels: y0, x0, y1, x1, the last two exclusive."""
        mask_HW = self.mask(index)
        rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
        return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1

    def generate(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw the image [H, W, 3] uint8 and the mask [H, W] bool."""
        parameters = self._parameters(index)
        image_HW3 = self._draw_background(index, parameters)
        mask_HW = np.zeros(self._image_size, dtype=bool)
        shape = self.class_names[self.labels_N[index]]
        window, paint_hw3, cover_hw = _paint_object(parameters, shape, self._image_size)
        image_HW3[window] = image_HW3[window] * (1 - cover_hw)[..., None] + paint_hw3
        mask_HW[window] = cover_hw > 0
        return np.rint(image_HW3).astype(np.uint8), mask_HW

    def _parameters(self, index: int) -> _Parameters:
        return _Parameters(*self.uniforms(index, len(_Parameters._fields)))

    def _draw_background(self, index: int, parameters: _Parameters) -> np.ndarray:
        """Draw the background alone, [H, W, 3] float64 in 0 .. 255."""
        dark, light = _PALETTES[int(parameters.palette * len(_PALETTES))]
        height, width = self._image_size
        if self._background == "plain":  # from 0 in one corner or edge to 1 in the opposite one
            angle = 2 * np.pi * parameters.direction
            ramp_HW = np.sin(angle) * np.arange(height)[:, None] + np.cos(angle) * np.arange(width)
            share_HW = (ramp_HW - ramp_HW.min()) / (ramp_HW.max() - ramp_HW.min())
        else:  # noise in 0 .. 1 with the amplitude 1/f, as natural images have it
            white_HW = self.uniforms(index, height * width, PURPOSE_NOISE).reshape(height, width)
            frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
            frequency[0, 0] = np.inf  # no mean
            pink_HW = np.fft.irfft2(np.fft.rfft2(white_HW) / frequency, s=(height, width))
            share_HW = np.clip(0.5 + 0.25 * pink_HW / pink_HW.std(), 0, 1)
        return dark + share_HW[..., None] * (light - dark)


def build(data: DataConfig, seed: int, of: type[ShapesSource] = ShapesSource) -> ShapesSource:
    """Build the source of `data.source=shapes`, or one derived from it."""
    return of(seed, data.samples, data.image_size, data.classes, data.background, data.root or None)


def _paint_object(
    parameters: _Parameters, shape: str, image_size: tuple[int, int]
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """Return the object's window (rows, columns), colour [h, w, 3] times coverage, 0 .. 255, and coverage [h, w]."""
    height, width = image_size
    radius = min(image_size) * (1 + parameters.radius / 2) / 4  # a diameter of 1/2 to 3/4 of the shorter side
    y = radius + parameters.y * (height - 2 * radius)
    x = radius + parameters.x * (width - 2 * radius)
    rows = slice(int(y - radius), int(np.ceil(y + radius)))
    columns = slice(int(x - radius), int(np.ceil(x + radius)))
    v = (rows.start + (np.arange((rows.stop - rows.start) * _SUBPIXELS) + 0.5) / _SUBPIXELS - y)[:, None] / radius
    u = (columns.start + (np.arange((columns.stop - columns.start) * _SUBPIXELS) + 0.5) / _SUBPIXELS - x) / radius
    angle = np.pi / 6 * (parameters.rotation - 0.5)  # 15 degrees to either side: a square is no diamond
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = cos * u + sin * v, cos * v - sin * u
    inside = _SHAPES[shape](u, v)
    cover_hw = _mean_subpixels(inside)
    second_hw = _mean_subpixels(inside & _texture(parameters, u, v))
    first_colour = 255 * np.array([parameters.red, parameters.green, parameters.blue])
    second_colour = (first_colour + 127.5) % 255  # far from the first in each channel, so the texture always shows
    paint_hw3 = (cover_hw - second_hw)[..., None] * first_colour + second_hw[..., None] * second_colour
    return (rows, columns), paint_hw3, cover_hw


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Five points: folded onto the half of one point, the star lies on one side of a line from tip to notch.
    angle = abs((np.arctan2(v, u) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    along, across = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    notch = 0.45 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    return (1 - along) * notch[1] > across * (1 - notch[0])


# Which points (u, v) lie in the shape; every shape touches the unit circle from within.
_SHAPES = {
    "disc": lambda u, v: u**2 + v**2 < 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < np.sqrt(0.5),
    "triangle": lambda u, v: np.maximum(v, np.sqrt(0.75) * abs(u) - 0.5 * v) < 0.5,
    "ring": lambda u, v: (u**2 + v**2 < 1) & (u**2 + v**2 > 0.5**2),
    # Arms are 0.6 wide; their length follows from the unit circle.
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < np.sqrt(1 - 0.3**2)),
    "star": _star,
}


def _texture(parameters: _Parameters, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Tell which points have the second colour: stripes, checks or dots."""
    periods = 1.5 + 1.5 * parameters.frequency  # per radius
    a, b = u * periods + parameters.phase, v * periods + parameters.phase
    kind = int(3 * parameters.texture)
    if kind == 0:
        return a % 1 < 0.5
    if kind == 1:
        return (a % 1 < 0.5) ^ (b % 1 < 0.5)
    return (a % 1 - 0.5) ** 2 + (b % 1 - 0.5) ** 2 < 0.33**2


def _mean_subpixels(subpixels: np.ndarray) -> np.ndarray:
    """Average [h S, w S] bool over the subpixels: [h, w] float64."""
    h, w = subpixels.shape[0] // _SUBPIXELS, subpixels.shape[1] // _SUBPIXELS
    return subpixels.reshape(h, _SUBPIXELS, w, _SUBPIXELS).mean(axis=(1, 3))
