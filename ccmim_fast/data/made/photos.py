"""This module cuts a small set of real pictures from the photographs in scikit-image's wheel, without a download."""

# H height, W width

import importlib.util
import os
from functools import lru_cache

import numpy as np
from PIL import Image

from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.index.formats import open_picture
from ccmim_fast.data.made.base import GeneratedSource
from ccmim_fast.errors import MachineError

_VERSION = 1  # of the crops: raise it when the same parameters give another crop, or old caches stay in use
_PHOTOS = ["astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png"]
_PHOTOS += ["motorcycle_left.png", "retina.jpg", "rocket.jpg"]
_SHARES = (0.3, 0.9)  # smallest and largest height of a crop, as a share of the largest crop that fits


class PhotosSource(GeneratedSource):
    """This source cuts out crops at random positions and scales, without rotation; see `GeneratedSource`.

    The crops have the aspect of `image_size`; the label is the photograph. Raises MachineError if scikit-image's wheel
    or a photograph in it is missing.
    """

    noun = "photograph"

    def __init__(self, seed: int, samples: int, image_size: tuple[int, int], cache_dir: str | None = None):
        self._paths = [photo_path(name) for name in _PHOTOS]
        names = tuple(os.path.splitext(name)[0] for name in _PHOTOS)
        fingerprint = f"photos-v{_VERSION}-seed{seed}-n{samples}-{image_size[0]}x{image_size[1]}"
        super().__init__(seed, samples, image_size, names, fingerprint, cache_dir)

    def generate(self, index: int) -> tuple[np.ndarray]:
        """Cut out the crop: ([H, W, 3] uint8,)."""
        photo = _open_photo(self._paths[self.labels_N[index]])
        u_scale, u_y, u_x = self.uniforms(index, 3)
        height, width = self._image_size
        share = _SHARES[0] + u_scale * (_SHARES[1] - _SHARES[0])
        crop_height = share * min(photo.height, photo.width * height / width)
        crop_width = crop_height * width / height
        y, x = u_y * (photo.height - crop_height), u_x * (photo.width - crop_width)
        crop = photo.resize((width, height), Image.Resampling.BICUBIC, box=(x, y, x + crop_width, y + crop_height))
        return (np.asarray(crop),)


def build(data: DataConfig, seed: int) -> PhotosSource:
    """Build the source of `data.source=photos`."""
    return PhotosSource(seed, data.samples, data.image_size, data.root or None)


def photo_path(name: str) -> str:
    """Return the path of a photograph in scikit-image's wheel. Raises MachineError if it is not there.

    The package is not imported, so nothing is downloaded.
    """
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise MachineError("data.source=photos needs scikit-image; pip install scikit-image")
    path = os.path.join(package.submodule_search_locations[0], "data", name)
    if not os.path.isfile(path):
        raise MachineError(f"this scikit-image has no {path!r}; pip install scikit-image==0.26")
    return path


@lru_cache(maxsize=len(_PHOTOS))
def _open_photo(path: str) -> Image.Image:
    with open_picture(path) as image:
        return image.convert("RGB")
