"""Photographs to test on, and folders made of them."""

import numpy as np
import pytest
from PIL import Image

from ccmim_fast.data.made.photos import photo_path


@pytest.fixture(autouse=True)
def _indexes_are_temporary(tmp_path_factory, monkeypatch):
    """Indexes are put in a folder of the test's own, never in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def photograph():
    """An RGB image of 400 x 300 pixels with no symmetry."""
    with Image.open(photo_path("astronaut.png")) as image:
        return image.convert("RGB").crop((40, 0, 440, 300))


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory, photograph):
    """Two classes of 11 JPEG and PNG files each, of different sizes."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(22):
        folder = root / f"class{index % 2}"
        folder.mkdir(exist_ok=True)
        size = (60 + 5 * index, 150 - 4 * index)
        crop = photograph.crop((index, index, index + size[0], index + size[1]))
        crop.save(folder / f"{index:02d}.{'png' if index % 4 == 3 else 'jpg'}")
    return root


@pytest.fixture
def write_image():
    """write_image(path, height, width, seed=0): a PNG of noise."""

    def write(path, height=8, width=8, seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, format="PNG")

    return write
