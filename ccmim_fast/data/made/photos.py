"""A small set of real pictures without a download: crops of the photographs that scikit-image's wheel contains."""

# N samples, H height, W width

import importlib.util
import os
from functools import lru_cache

import numpy as np
from PIL import Image

from ccmim_fast.data.made.cache import stored_records
from ccmim_fast.data.made.draws import PURPOSE_PARAMETERS, balanced_labels, sample_uniforms
from ccmim_fast.data.source import NOTHING_EXCLUDED, encode_pnm
from ccmim_fast.errors import ConfigError, MachineError

_VERSION = 1  # of the crops: raise it when a parameter gives another crop, or old caches stay in use
_PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
_SHARES = (0.3, 0.9)  # of the largest crop that fits: its height, from .. to


class PhotosSource:
    """Crops at random places and scales, RGB, without rotation; a `Source`. Crop i is a function of i, the seed and the
    size only, and its label the photograph it comes from.

    Args:
        seed: 0 .. 2**32 - 1.
        samples: N.
        image_size: height and width, pixels; the crops have this aspect.
        cache_dir: folder for the crops, cut once; None: cut at each call.

    Raises:
        ConfigError: a parameter out of its range.
        MachineError: scikit-image is missing, or has not these photographs in its wheel.
    """

    channels = 3
    excluded_X = NOTHING_EXCLUDED

    def __init__(self, seed: int, samples: int, image_size: tuple[int, int], cache_dir: str | None = None) -> None:
        if samples < 1 or min(image_size) < 1:
            raise ConfigError(f"data.samples={samples} and data.image_size={image_size} must be at least 1")
        self._seed, self._image_size = seed, image_size
        self._paths = [photo_path(name) for name in _PHOTOS]
        self.class_names = tuple(os.path.splitext(name)[0] for name in _PHOTOS)
        self.labels_N = balanced_labels(seed, samples, len(_PHOTOS))
        self.sizes_N2 = np.tile(np.array(image_size, dtype=np.int32), (samples, 1))
        self._records = None
        height, width = image_size
        self.fingerprint = f"photos-v{_VERSION}-seed{seed}-n{samples}-{height}x{width}"
        if cache_dir is not None:
            dtype = np.dtype([("image", np.uint8, (height, width, 3))])
            self._records = stored_records(
                cache_dir, self.fingerprint, dtype, samples, lambda index: (self._cut(index),)
            )

    def __len__(self) -> int:
        return len(self.labels_N)

    def name(self, index: int) -> str:
        """See `Source`."""
        return f"photograph {index}"

    def decode(self, index: int) -> np.ndarray:
        """See `Source`."""
        return self._cut(index) if self._records is None else self._records[index]["image"]

    def read(self, index: int) -> bytes:
        """See `Source`."""
        return encode_pnm(self.decode(index))

    def _cut(self, index: int) -> np.ndarray:
        photo = _open_photo(self._paths[self.labels_N[index]])
        u_scale, u_y, u_x = sample_uniforms(self._seed, index, 3, PURPOSE_PARAMETERS)
        height, width = self._image_size
        share = _SHARES[0] + u_scale * (_SHARES[1] - _SHARES[0])
        crop_height = share * min(photo.height, photo.width * height / width)
        crop_width = crop_height * width / height
        y, x = u_y * (photo.height - crop_height), u_x * (photo.width - crop_width)
        crop = photo.resize((width, height), Image.Resampling.BICUBIC, box=(x, y, x + crop_width, y + crop_height))
        return np.asarray(crop)


def photo_path(name: str) -> str:
    """Where a photograph of scikit-image's wheel lies; its package is not imported, so it cannot download anything.

    Raises MachineError if it is not there.
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
    with Image.open(path) as image:
        return image.convert("RGB")
