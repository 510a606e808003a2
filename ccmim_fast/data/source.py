"""What every set of images offers, and the one image format that any decoder reads alike."""

# N images, H height, W width, C channels

from typing import Protocol

import numpy as np


class Source(Protocol):
    """Images by index, with their sizes known beforehand.

    Attributes:
        channels: C of every image.
        sizes_N2: int32 height and width in pixels, after any EXIF rotation.
        labels_N: int64 indices into `class_names`, or None without labels.
        class_names: sorted; empty without labels.
    """

    channels: int
    sizes_N2: np.ndarray
    labels_N: np.ndarray | None
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def decode(self, index: int) -> np.ndarray:
        """Pixels of one image, [H, W, C] uint8, of the size in `sizes_N2`; read-only.

        Raises DataError naming the image.
        """
        ...

    def read(self, index: int) -> bytes:
        """One encoded image in which any decoder finds the pixels of `decode`, up to its rounding; C is 1 or 3.

        Raises DataError naming the image.
        """
        ...


def encode_pnm(image_HWC: np.ndarray) -> bytes:
    """A [H, W, 1] or [H, W, 3] uint8 image as a PGM or PPM file: a short header and the bytes themselves."""
    height, width, channels = image_HWC.shape
    kind = {1: 5, 3: 6}[channels]
    return f"P{kind} {width} {height} 255\n".encode() + image_HWC.tobytes()
