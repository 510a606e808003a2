"""Stores of maps that the training device has no room for: in the host's memory, or in a file mapped into it.

They behave as `bank.DeviceStore` does: a read sees every earlier write, and nobody waits for the device.
"""

# N maps, P of them, G cells per side

import os
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.bank.bank import DeviceStore
from ccmim_fast.errors import ConfigError, MachineError

_IN_FLIGHT = 4  # steps whose maps may be on their way to the host; beyond, the oldest is waited for


class _Write(NamedTuple):
    """Maps on their way to the host, complete once `arrived` has happened."""

    rows_P: np.ndarray
    maps_PGG: Tensor
    arrived: "torch.cuda.Event"


class HostStore(DeviceStore):
    """Maps in the host's memory.

    Only the rows of a step cross to the device and back, through pinned memory: 0.5 MB for 1,024 maps of 16 x 16; the
    host gathers them, so the maps themselves are not pinned. A write is carried out when its maps have arrived; only a
    read of the same rows before that, as where two epochs meet, waits for them.
    """

    def __init__(self, maps_NGG: Tensor, device: torch.device):
        super().__init__(maps_NGG, device)
        self._writes: deque[_Write] = deque()

    def read(self, rows_P: np.ndarray) -> Tensor:
        while self._writes and self._writes[0].arrived.query():
            self._finish_oldest()
        while any(np.isin(write.rows_P, rows_P).any() for write in self._writes):
            self._finish_oldest()
        if self._device.type != "cuda":
            return super().read(rows_P)
        pinned_PGG = torch.empty(len(rows_P), *self._maps_NGG.shape[1:], dtype=torch.float16, pin_memory=True)
        torch.index_select(self._maps_NGG, 0, torch.from_numpy(rows_P), out=pinned_PGG)
        return pinned_PGG.to(self._device, non_blocking=True)

    def write(self, rows_P: np.ndarray, maps_PGG: Tensor) -> None:
        if maps_PGG.device.type != "cuda":
            super().write(rows_P, maps_PGG)
            return
        pinned_PGG = torch.empty(maps_PGG.shape, dtype=torch.float16, pin_memory=True)
        pinned_PGG.copy_(maps_PGG, non_blocking=True)
        self._writes.append(_Write(rows_P, pinned_PGG, torch.cuda.current_stream(self._device).record_event()))
        if len(self._writes) > _IN_FLIGHT:
            self._finish_oldest()

    def contents(self) -> Tensor:
        while self._writes:
            self._finish_oldest()
        return self._maps_NGG

    def fill(self, maps_NGG: Tensor) -> None:
        self._writes.clear()
        super().fill(maps_NGG)

    def _finish_oldest(self) -> None:
        write = self._writes.popleft()
        write.arrived.synchronize()
        self._maps_NGG.index_copy_(0, torch.from_numpy(write.rows_P), write.maps_PGG)


class FileStore(HostStore):
    """Maps in a file, which the operating system keeps in memory as far as it has room.

    The file is made anew, all of its length reserved (MachineError: the disk has no room); it is a working copy, the
    checkpoints hold the maps for good.
    """

    def __init__(self, path: Path, maps: int, cells: int, device: torch.device):
        self._bytes = 2 * cells * cells  # of a map
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self._file = path.open("x+b")
            # Reserved, so that no write to the mapped memory finds the disk full, which would kill the process.
            os.posix_fallocate(self._file.fileno(), 0, maps * self._bytes)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise MachineError(
                f"{path}: no room for {maps * self._bytes / 1e9:.1f} GB of score maps: {error.strerror}; "
                "free some, or make score.grid smaller"
            ) from None
        flat = torch.from_file(str(path), shared=True, size=maps * cells * cells, dtype=torch.float16)
        super().__init__(flat.view(maps, cells, cells), device)

    def prefetch(self, rows_P: np.ndarray) -> None:
        for row in rows_P.tolist():
            os.posix_fadvise(self._file.fileno(), row * self._bytes, self._bytes, os.POSIX_FADV_WILLNEED)


def choose_store(store: str, maps: int, cells: int, device_gb: float, host_gb: float) -> str:
    """Return `score.store`, for `auto` the first of `device`, `host`, `file` that holds the maps; else ConfigError."""
    needed = maps * cells * cells * 2 / 1e9
    budgets = {"device": device_gb, "host": host_gb, "file": float("inf")}
    if store == "auto":
        return next(name for name, budget in budgets.items() if needed <= budget)
    if needed > budgets[store]:
        raise ConfigError(
            f"score.store={store}: {maps} maps of {cells} x {cells} take {needed:.1f} GB, score.{store}_gb="
            f"{budgets[store]:g}; raise that, or use store=auto"
        )
    return store


def open_store(name: str, maps: int, cells: int, device: torch.device, path: Path) -> DeviceStore:
    """Return a store of zeros by a name that `choose_store` gave; `path` is for `file`."""
    if name == "file":
        return FileStore(path, maps, cells, device)
    kind, memory = (DeviceStore, device) if name == "device" else (HostStore, "cpu")
    return kind(torch.zeros(maps, cells, cells, dtype=torch.float16, device=memory), device)
