"""This module defines the interface of every set of images, and an image format that all decoders read alike."""

# N samples, P positions, X excluded samples, H height, W width, C channels

import copy
import hashlib
from typing import Protocol

import numpy as np

from ccmim_fast.errors import DataError


class Source(Protocol):
    """A source gives images by sample id, 0 .. N - 1; their sizes are known before they are read."""

    channels: int  # C of every image
    dtype: np.dtype  # of the pixels: uint8, or float32 where they were stored with more than 8 bits
    sizes_N2: np.ndarray  # int32 height and width in pixels, after any EXIF rotation
    labels_N: np.ndarray | None  # integer indices into `class_names`, or None without labels
    class_names: tuple[str, ...]  # sorted; empty without labels
    excluded_X: np.ndarray  # int64 ids, ascending, of the samples that are known to be unusable
    fingerprint: str  # equal for two sources if they have the same images under the same ids

    def __len__(self) -> int:
        """Return N, the excluded samples included."""

    def name(self, index: int) -> str:
        """Return the image's path or another name for messages."""

    def decode(self, index: int) -> np.ndarray:
        """Return the pixels of one image, [H, W, C] of `dtype`, 255 for white whatever it is, read-only.

        Raises DataError naming an image that fails.
        """

    def read(self, index: int) -> bytes:
        """Return one encoded image in which any decoder finds the pixels of `decode`, up to rounding.

        C is 1 or 3, `dtype` uint8.
        Raises DataError naming an image that fails.
        """


class UnreadableError(DataError):
    """An image's bytes cannot be read now; the image itself may be good and is tried again in the next run."""


NOTHING_EXCLUDED = np.zeros(0, dtype=np.int64)


def usable_count(source: Source) -> int:
    """Return the number of samples that are not excluded."""
    return len(source) - len(source.excluded_X)


def without(source: Source, ids_X: np.ndarray, why: str) -> Source:
    """Return the same source without some more of its samples; `left_out` of it tells their ids [X] by the reason.

    `why` is a phrase behind "left out": "without a label". Their share is not held against `data.max_bad`.
    """
    if not len(ids_X):
        return source
    made = copy.copy(source)
    made.excluded_X = np.union1d(source.excluded_X, ids_X).astype(np.int64)
    made.left_out = {**getattr(source, "left_out", {}), why: ids_X}
    made.fingerprint = hashlib.sha256(source.fingerprint.encode() + made.excluded_X.tobytes()).hexdigest()[:16]
    return made


def usable_ids(source: Source, positions_P: np.ndarray) -> np.ndarray:
    """Return the ids [P] int64 of the usable samples at some positions among all usable samples in order of id."""
    # Before the excluded id x_k lie x_k - k usable samples; an id grows by one for every x_k - k <= its position.
    shifts_X = source.excluded_X - np.arange(len(source.excluded_X))
    return positions_P + np.searchsorted(shifts_X, positions_P, side="right")


def usable_positions(source: Source, ids_P: np.ndarray) -> np.ndarray:
    """Return the positions [P] int64 of usable samples among all usable samples: the inverse of `usable_ids`."""
    return ids_P - np.searchsorted(source.excluded_X, ids_P)


def encode_pnm(image_HWC: np.ndarray) -> bytes:
    """Encode a [H, W, 1] or [H, W, 3] uint8 image as a PGM or PPM file: a short header and the pixels themselves."""
    height, width, channels = image_HWC.shape
    kind = {1: 5, 3: 6}[channels]
    return f"P{kind} {width} {height} 255\n".encode() + image_HWC.tobytes()
