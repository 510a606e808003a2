"""Made images kept on disk: built once, mapped into memory afterwards."""

import os
import tempfile
from collections.abc import Callable

import numpy as np


def stored_records(folder: str, name: str, dtype: np.dtype, samples: int, make: Callable[[int], tuple]) -> np.ndarray:
    """The records make(0) .. make(samples - 1), read-only, from the file `name`.npy in `folder`.

    A file that is missing or damaged is built anew, beside its place, and moved there when it is whole: a process that
    is killed leaves no half of it, and of several that build it the last one wins, all being equal.

    Args:
        name: holds every parameter that `make` depends on, its version included.
        dtype: structured, one field per element of what `make` returns.
    """
    path = os.path.join(folder, f"{name}.npy")
    try:
        return np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
        unfinished = os.path.join(scratch, "records.npy")
        records = np.lib.format.open_memmap(unfinished, mode="w+", dtype=dtype, shape=(samples,))
        for index in range(samples):
            records[index] = make(index)
        records.flush()
        os.replace(unfinished, path)
    return np.load(path, mmap_mode="r")
