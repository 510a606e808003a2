"""What every set of images offers, and the one image format that any decoder reads alike."""

# N samples, P places, X excluded samples, H height, W width, C channels

from typing import Protocol

import numpy as np

from ccmim_fast.errors import DataError


class Source(Protocol):
    """Images by sample id, 0 .. N - 1, with their sizes known beforehand.

    Attributes:
        channels: C of every image.
        sizes_N2: int32 height and width in pixels, after any EXIF rotation.
        labels_N: integer indices into `class_names`, or None without labels.
        class_names: sorted; empty without labels.
        excluded_X: int64 ids, ascending, of samples known to be no usable image.
        fingerprint: equal for two sources if they have the same images under the same ids.
    """

    channels: int
    sizes_N2: np.ndarray
    labels_N: np.ndarray | None
    class_names: tuple[str, ...]
    excluded_X: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        """N, the excluded ones included."""
        ...

    def name(self, index: int) -> str:
        """Where the image lies, for messages."""
        ...

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


class UnreadableError(DataError):
    """An image's bytes cannot be had now; the image itself may be good, and is tried again in the next run."""


NOTHING_EXCLUDED = np.zeros(0, dtype=np.int64)


def usable(source: Source) -> int:
    """How many samples are not excluded."""
    return len(source) - len(source.excluded_X)


def left_out(source: Source) -> list[str]:
    """How many samples are excluded, in words that name the first one; nothing without any."""
    count = len(source.excluded_X)
    return [f"{count} of {len(source)} left out, the first {source.name(int(source.excluded_X[0]))!r}"] if count else []


def usable_ids(source: Source, places_P: np.ndarray) -> np.ndarray:
    """Ids [P] int64 of the usable samples at the places 0 .. `usable(source)` - 1, in ascending order of ids."""
    # Before excluded id x_k lie x_k - k usable ones; a sample at place p is moved on by every x_k - k <= p.
    shifts_X = source.excluded_X - np.arange(len(source.excluded_X))
    return places_P + np.searchsorted(shifts_X, places_P, side="right")


def usable_numbers(source: Source, ids_P: np.ndarray) -> np.ndarray:
    """The inverse: places [P] int64 of usable samples among the usable ones."""
    return ids_P - np.searchsorted(source.excluded_X, ids_P)


def encode_pnm(image_HWC: np.ndarray) -> bytes:
    """A [H, W, 1] or [H, W, 3] uint8 image as a PGM or PPM file: a short header and the bytes themselves."""
    height, width, channels = image_HWC.shape
    kind = {1: 5, 3: 6}[channels]
    return f"P{kind} {width} {height} 255\n".encode() + image_HWC.tobytes()
