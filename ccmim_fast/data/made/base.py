"""Generated image sources share random numbers by (seed, sample id), balanced labels and a cache on disk."""

# N samples, K classes, H height, W width

import os
import tempfile
from collections.abc import Callable, Iterable

import numpy as np
import torch

from ccmim_fast.data.source import NOTHING_EXCLUDED, encode_pnm
from ccmim_kernels.philox import STREAM_SHAPES, keyed_uniform

# What `philox` calls the epoch separates the purposes of one sample's random numbers here.
PURPOSE_LABEL, PURPOSE_PARAMETERS, PURPOSE_NOISE = range(3)


class GeneratedSource:
    """This base generates RGB images; it is a `Source`. Image i is a function of i and the arguments only.

    A subclass has a `noun` for messages, and `generate`; its `fingerprint` holds every parameter that the images depend
    on, and the version of the code. Images are generated once, into the folder `cache_dir`, or at each call if that is
    None. `fields` are NumPy's (name, dtype, shape) of what `generate` returns after the image.
    """

    channels, dtype = 3, np.dtype(np.uint8)
    excluded_X = NOTHING_EXCLUDED
    noun = "image"

    def __init__(
        self,
        seed: int,
        samples: int,
        image_size: tuple[int, int],
        class_names: tuple[str, ...],
        fingerprint: str,
        cache_dir: str | None,
        fields: Iterable[tuple] = (),
    ):
        self._seed, self._image_size, self.class_names, self.fingerprint = seed, image_size, class_names, fingerprint
        self.labels_N = balanced_labels(seed, samples, len(class_names))
        self.sizes_N2 = np.tile(np.array(image_size, dtype=np.int32), (samples, 1))
        self._record = self.generate
        if cache_dir is not None:
            dtype = np.dtype([("image", np.uint8, (*image_size, 3)), *fields])
            self._record = cached_records(cache_dir, fingerprint, dtype, samples, self.generate).__getitem__

    def __len__(self) -> int:
        return len(self.labels_N)

    def generate(self, index: int) -> tuple[np.ndarray, ...]:
        """Generate the image, [H, W, 3] uint8, and the other fields."""
        raise NotImplementedError

    def uniforms(self, index: int, count: int, purpose: int = PURPOSE_PARAMETERS) -> np.ndarray:
        """Return [count] float64 in (0, 1), a function of (seed, index, purpose)."""
        return keyed_uniform(self._seed, purpose, torch.tensor([index]), count, STREAM_SHAPES)[0].numpy()

    def name(self, index: int) -> str:
        return f"{self.noun} {index}"

    def decode(self, index: int) -> np.ndarray:
        return self._record(index)[0]

    def read(self, index: int) -> bytes:
        return encode_pnm(self.decode(index))


def balanced_labels(seed: int, samples: int, classes: int) -> np.ndarray:
    """Return [N] int64 in 0 .. K - 1: each K consecutive samples hold every class once, in an order drawn for them.

    A label therefore depends on (seed, id, K) alone, and no stride through the ids misses a class.
    """
    blocks = -(-samples // classes)
    u_N1 = keyed_uniform(seed, PURPOSE_LABEL, torch.arange(blocks * classes), 1, STREAM_SHAPES).numpy()
    ranks = u_N1.reshape(blocks, classes).argsort(axis=1)
    return ranks.reshape(-1)[:samples].astype(np.int64)


def cached_records(folder: str, name: str, dtype: np.dtype, samples: int, make: Callable[[int], tuple]) -> np.ndarray:
    """Return the records make(0) .. make(samples - 1), mapped read-only from the file `name`.npy in `folder`.

    A missing or damaged file is built in a scratch folder and moved into place when it is whole: a killed process
    leaves no half file, and of several processes that build it the last one wins, since all build the same.
    """
    path = os.path.join(folder, f"{name}.npy")
    try:
        return np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
        unfinished = os.path.join(scratch, "records.npy")
        # Written, not mapped: on a full disk a write to mapped memory would end the process by a signal.
        with open(unfinished, "wb") as file:
            shape = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (samples,)}
            np.lib.format.write_array_header_1_0(file, shape)
            for index in range(samples):
                file.write(np.array([make(index)], dtype).tobytes())
        os.replace(unfinished, path)
    return np.load(path, mmap_mode="r")
