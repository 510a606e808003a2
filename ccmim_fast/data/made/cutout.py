"""This module opens cut-outs and backgrounds, and pastes one into the other with an exact mask."""

# H W the image's height and width, h w an object's

from fractions import Fraction

import numpy as np
from PIL import Image, ImageOps

from ccmim_fast.data.index.decode import decode
from ccmim_fast.data.index.formats import open_picture
from ccmim_fast.errors import DataError, one_line

_SOLID = 128  # alpha from which a pixel is of the object: half of 255, rounded up
_FAINT = 8  # alpha below which a pixel at the rim is not seen, and cut away
_LEAST_PIXELS = 16  # of an object at its smallest: a thin one would vanish
# Its weights are never negative: no light or dark rim, and no alpha beyond 0 .. 255. Objects and backgrounds are both
# resized by it, so that sharpness does not tell them apart.
_FILTER = Image.Resampling.HAMMING
_CROPS = (0.3, 1.0)  # smallest and largest height of a background's crop, as a share of the largest that fits
_FINER = 4  # pixels kept of a large picture, a side, for one of its smallest use


def open_cutout(data: bytes, least: int, most: int) -> Image.Image:
    """Decode a cut-out, RGBA, without the transparent rim.

    Args:
        least, most: longer sides of the objects that it will become, pixels.

    Raises:
        DataError: the reason why it is of no use.
    """
    try:
        with open_picture(data) as opened:
            image = ImageOps.exif_transpose(opened)
    except Exception as error:  # Pillow's plugins raise errors of any type on damaged pixels
        raise DataError(one_line(error)) from error
    if not image.has_transparency_data:
        raise DataError("no alpha channel: no cut-out")
    image = image.convert("RGBA")
    alpha_HW = np.asarray(image)[..., 3]
    if (alpha_HW >= _SOLID).all():
        raise DataError("opaque everywhere: no cut-out")
    if not (alpha_HW >= _SOLID).any():
        raise DataError("transparent everywhere: at no pixel is alpha at least a half")
    rows, columns = (np.flatnonzero((alpha_HW >= _FAINT).any(axis)) for axis in (1, 0))
    image = image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    if max(image.size) < least:
        raise DataError("smaller than the smallest object that is drawn")
    image = _reduced(image, max(image.size), most)
    if (resized(image, least)[..., 3] >= 127.5).sum() < _LEAST_PIXELS:
        raise DataError("too thin: next to nothing is left of it at the smallest size")
    return image


def open_background(data: bytes, image_size: tuple[int, int]) -> Image.Image:
    """Decode a background, RGB; alpha is dropped. Raises DataError with the reason why it is of no use."""
    image = Image.fromarray(decode(data, channels=3))
    return _reduced(image, min(image.size), int(max(image_size) / _CROPS[0]))


def crop_background(image: Image.Image, image_size: tuple[int, int], u_3: np.ndarray) -> np.ndarray:
    """Cut out a crop of the aspect of `image_size` by three numbers in (0, 1), for its height, y and x.

    Returns [H, W, 3] uint8; a background that is too small is enlarged.
    """
    height, width = image_size
    share = _CROPS[0] + u_3[0] * (_CROPS[1] - _CROPS[0])
    crop_height = share * min(image.height, image.width * height / width)
    crop_width = crop_height * width / height
    y, x = u_3[1] * (image.height - crop_height), u_3[2] * (image.width - crop_width)
    box = (x, y, min(x + crop_width, image.width), min(y + crop_height, image.height))
    return np.asarray(image.resize((width, height), _FILTER, box=box))


def resized(image: Image.Image, side: int) -> np.ndarray:
    """Resize an RGBA image to a longer side of `side` pixels: [h, w, 4] float32, colours times alpha, 0 .. 255.

    Colours count by their alpha, so that what a transparent pixel holds is not seen.
    """
    pixels_hw4 = np.asarray(image).astype(np.float32)
    pixels_hw4[..., :3] *= pixels_hw4[..., 3:] / 255
    # In whole numbers, rounded half up: a float may fall to either side.
    shorter = max(1, int(Fraction(2 * side * min(image.size) + max(image.size), 2 * max(image.size))))
    size = (side, shorter) if image.width >= image.height else (shorter, side)
    parts = [Image.fromarray(np.ascontiguousarray(pixels_hw4[..., c])).resize(size, _FILTER) for c in range(4)]
    return np.stack([np.asarray(part) for part in parts], axis=-1)


def paste(background_HW3: np.ndarray, object_hw4: np.ndarray, y: int, x: int) -> tuple[np.ndarray, np.ndarray]:
    """Paste an object of `resized` at a place: [H, W, 3] uint8, and the mask [H, W] bool.

    A pixel is object + (1 - alpha) * background, rounded once; the mask has those whose alpha is at least a half.
    """
    height, width = object_hw4.shape[:2]
    window = slice(y, y + height), slice(x, x + width)
    image_HW3, mask_HW = background_HW3.copy(), np.zeros(background_HW3.shape[:2], dtype=bool)
    mixed_hw3 = object_hw4[..., :3] + (1 - object_hw4[..., 3:] / 255) * background_HW3[window]
    image_HW3[window] = np.rint(mixed_hw3).clip(0, 255).astype(np.uint8)
    mask_HW[window] = object_hw4[..., 3] >= 127.5
    return image_HW3, mask_HW


def _reduced(image: Image.Image, side: int, asked: int) -> Image.Image:
    """Average blocks of the pixels of an image whose side is many times what is asked of it, for memory and speed."""
    factor = side // (_FINER * asked)
    return image.reduce(factor) if factor > 1 else image
