"""Where maps lie: on the training device, in the host's memory, or in a file that the host maps into its memory.

All three behave alike: what is taken holds everything that was put before, and nobody waits for the device.
"""

# N maps, P of them, G cells per side

import os
from collections import deque
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.data.stream.batch import to_device
from ccmim_fast.errors import ConfigError, MachineError

_IN_FLIGHT = 4  # steps whose maps may be on their way to the host; the oldest is waited for beyond


class Store(Protocol):
    """N maps of G x G scores, float16, all 0 at first."""

    def take(self, rows_P: np.ndarray) -> Tensor:
        """The maps of some rows, [P, G, G], on the training device."""
        ...

    def put(self, rows_P: np.ndarray, maps_PGG: Tensor) -> None:
        """Replace some rows, each one at most once; the maps are on the training device."""
        ...

    def expect(self, rows_P: np.ndarray) -> None:
        """These rows will be taken soon: what is slow to reach may be brought near."""
        ...

    def contents(self) -> Tensor:
        """All maps [N, G, G] on the host, as of now; not to be written to."""
        ...

    def fill(self, maps_NGG: Tensor) -> None:
        """Replace all maps, by some on the host."""
        ...


class DeviceStore:
    """Maps in the training device's own memory; a `Store`."""

    def __init__(self, maps: int, cells: int, device: torch.device):
        self._device = device
        self._maps_NGG = torch.zeros(maps, cells, cells, dtype=torch.float16, device=device)

    def take(self, rows_P: np.ndarray) -> Tensor:
        return self._maps_NGG.index_select(0, to_device(rows_P, self._device))

    def put(self, rows_P: np.ndarray, maps_PGG: Tensor) -> None:
        self._maps_NGG.index_copy_(0, to_device(rows_P, self._device), maps_PGG)

    def expect(self, rows_P: np.ndarray) -> None:
        """Nothing is nearer."""

    def contents(self) -> Tensor:
        return self._maps_NGG.cpu()

    def fill(self, maps_NGG: Tensor) -> None:
        self._maps_NGG.copy_(maps_NGG)


class _Put(NamedTuple):
    """Maps on their way to the host; there once `arrived` is over."""

    rows_P: np.ndarray
    maps_PGG: Tensor
    arrived: "torch.cuda.Event"


class HostStore:
    """Maps in the host's memory; a `Store`.

    Only the rows of a step cross to the device and back, through pinned memory: a copy of 0.5 MB for 1,024 maps of 16 x
    16. The maps themselves need not be pinned, as it is the host that gathers them. What is on its way back is written
    when it has arrived; only who asks for the same rows before, as at the seam of two epochs, waits for them.
    """

    def __init__(self, maps_NGG: Tensor, device: torch.device):
        self._maps_NGG, self._device = maps_NGG, device
        self._puts: deque[_Put] = deque()

    def take(self, rows_P: np.ndarray) -> Tensor:
        self._write_arrived()
        while any(np.isin(put.rows_P, rows_P).any() for put in self._puts):
            self._write_oldest()
        rows = torch.from_numpy(rows_P)
        if self._device.type != "cuda":
            return self._maps_NGG.index_select(0, rows)
        pinned_PGG = torch.empty(len(rows_P), *self._maps_NGG.shape[1:], dtype=torch.float16, pin_memory=True)
        torch.index_select(self._maps_NGG, 0, rows, out=pinned_PGG)
        return pinned_PGG.to(self._device, non_blocking=True)

    def put(self, rows_P: np.ndarray, maps_PGG: Tensor) -> None:
        if maps_PGG.device.type != "cuda":
            self._maps_NGG.index_copy_(0, torch.from_numpy(rows_P), maps_PGG)
            return
        pinned_PGG = torch.empty(maps_PGG.shape, dtype=torch.float16, pin_memory=True)
        pinned_PGG.copy_(maps_PGG, non_blocking=True)
        self._puts.append(_Put(rows_P, pinned_PGG, torch.cuda.current_stream(self._device).record_event()))
        if len(self._puts) > _IN_FLIGHT:
            self._write_oldest()

    def expect(self, rows_P: np.ndarray) -> None:
        """Memory is near."""

    def contents(self) -> Tensor:
        while self._puts:
            self._write_oldest()
        return self._maps_NGG

    def fill(self, maps_NGG: Tensor) -> None:
        self._puts.clear()
        self._maps_NGG.copy_(maps_NGG)

    def _write_arrived(self) -> None:
        while self._puts and self._puts[0].arrived.query():
            self._write_oldest()

    def _write_oldest(self) -> None:
        put = self._puts.popleft()
        put.arrived.synchronize()
        self._maps_NGG.index_copy_(0, torch.from_numpy(put.rows_P), put.maps_PGG)


class FileStore(HostStore):
    """Maps in a file; a `Store`. The system keeps in memory what it has room for.

    Args:
        path: made anew, all of its length reserved; a working copy: what lasts is in the checkpoints.

    Raises:
        MachineError: the disk has no room for it.
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

    def expect(self, rows_P: np.ndarray) -> None:
        for row in rows_P.tolist():
            os.posix_fadvise(self._file.fileno(), row * self._bytes, self._bytes, os.POSIX_FADV_WILLNEED)


def choose_store(store: str, maps: int, cells: int, device: torch.device, device_gb: float, host_gb: float) -> str:
    """`device`, `host` or `file`: what `score.store` names; for `auto` the first of them that holds the maps.

    Raises:
        ConfigError: the one that is named does not.
    """
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


def open_store(name: str, maps: int, cells: int, device: torch.device, path: Path) -> Store:
    """The store of a name that `choose_store` gave; `path` is for `file`."""
    if name == "device":
        return DeviceStore(maps, cells, device)
    if name == "host":
        return HostStore(torch.zeros(maps, cells, cells, dtype=torch.float16), device)
    return FileStore(path, maps, cells, device)
