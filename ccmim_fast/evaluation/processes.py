"""What other processes prepare: whole micro-batches in their order, and the user's errors as they are."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ccmim_fast.data.threads import thread_count
from ccmim_fast.errors import CcmimError

_AHEAD = 1  # micro-batches of each process: as large as a step's, and there are as many of them as processes


def prepared(
    samples: Dataset,
    batches: Iterable[list],
    collate: Callable[[list], Any],
    workers: int,
    device: torch.device,
) -> Iterator[Any]:
    """What `collate` makes of the samples of each batch, in order.

    Args:
        samples: key -> sample.
        batches: of keys; asked for no further ahead than one a process.
        collate: a list of samples -> a micro-batch; runs where they are made.
        workers: processes; 1: this one prepares; 0: see `thread_count`.
        device: where the batches will go; for "cuda" they are in pinned memory.

    Raises:
        CcmimError: a sample's own, with its message alone, when its batch has its turn.
    """
    workers = thread_count(workers)
    workers = 0 if workers == 1 else workers
    loader = DataLoader(
        _Whole(samples, collate),
        batch_size=None,
        sampler=batches,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        if isinstance(batch, CcmimError):
            raise batch
        yield batch


class _Whole(Dataset):
    """Keys of a batch -> the batch, or the user's error: raised in a process, torch would put its traceback first."""

    def __init__(self, samples: Dataset, collate: Callable[[list], Any]):
        self._samples, self._collate = samples, collate

    def __getitem__(self, keys: list) -> Any:
        try:
            return self._collate([self._samples[key] for key in keys])
        except CcmimError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch
