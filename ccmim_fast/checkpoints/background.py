"""Checkpoints are written while training goes on: the state is copied at once, and a thread writes the copy.

On CUDA the copy is only enqueued: the order of the stream keeps it before the next step's changes, and the thread waits
for it. On a CPU it is made before `save` returns. Until it is written it takes as much memory on the host as the state.
No buffer is kept here: torch keeps pinned memory, and the C library that of a CPU run (engine/build.py), so that
the next save finds it mapped already.

Where ranks have divided the weights all of them write: the first one leads, and each hears how it ended.
"""

import contextlib
import copy
import datetime
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from ccmim_fast.checkpoints import distributed, io
from ccmim_fast.checkpoints.manifest import Sum
from ccmim_fast.errors import CheckpointError
from ccmim_fast.optim.update import own_part

_FAILURES = 3  # saves in a row that may not fail; fewer are a warning


class CollectiveWriter:
    """Writes checkpoints with all ranks, in a process group of its own: a thread of each saves while another trains.

    One rank waits `timeout` for another. The copies of divided tensors lie in `mesh`, the ranks' host memories.
    """

    def __init__(self, timeout: datetime.timedelta):
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self.mesh = DeviceMesh.from_group(self._group, "cpu")

    def save(self, folder: Path, step: int, state: dict[str, Any], keep: int, for_good: bool = False) -> None:
        """Save as `io.save` does; every rank calls this, and a CheckpointError is raised on every rank."""
        rest, pieces = distributed.divide(state)
        if dist.get_rank() != 0:
            self._follow(pieces)
            return

        def beside(new: Path) -> dict[str, Sum]:
            self._broadcast("write", str(new))
            return distributed.write(new, pieces, self._group)

        try:
            io.save(folder, step, rest, keep, for_good, beside)
        except BaseException as error:
            self._broadcast("failed", str(error))
            raise
        self._broadcast("saved")

    def _follow(self, pieces: dict[str, Tensor]) -> None:
        while True:
            kind, text = self._broadcast()
            if kind == "saved":
                return
            if kind == "failed":
                raise CheckpointError(text)
            # An error is the first rank's, too, which tells of it.
            with contextlib.suppress(OSError):
                distributed.write(Path(text), pieces, self._group)

    def _broadcast(self, kind: str = "", text: str = "") -> list[str]:
        """Return the message of the first rank: `write` and a folder, `failed` and an error, or `saved`."""
        message = [kind, text]
        dist.broadcast_object_list(message, src=0, group=self._group)
        return message


class BackgroundSaver:
    """Saves the checkpoints of a run, one at a time, in the order in which they were asked for.

    A save that fails, on a full disk or the like, is a warning; the third in a row, and the last of all, are an error.
    The thread reports nothing: failures come out of the next `save`, `poll`, `wait` or `close`. The saver is a context
    manager that closes at the end; where an error ends the run, a failed save only adds a line.

    Args:
        keep: newest ones kept, see `io.save`.
        note: prints a line; called in the thread of the caller.
        collective: of ranks that have divided the state among them; each has a saver and calls it as the others do.
    """

    def __init__(
        self, folder: Path, keep: int, note: Callable[[str], None], collective: CollectiveWriter | None = None
    ):
        self._folder, self._keep, self._note, self._collective = folder, keep, note, collective
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._running: Future | None = None
        # Of the saves since the last good one. Lines only: an exception would keep the state alive through its frames.
        self._failed: list[str] = []

    def save(self, step: int, state: dict[str, Any], for_good: bool = False) -> None:
        """Begin to save `state` as it is now, as `io.save` does; it may be changed in place afterwards.

        The save before is waited for. Raises CheckpointError if three in a row have failed, and any other error of it.
        """
        self.wait()
        mesh, save = (None, io.save) if self._collective is None else (self._collective.mesh, self._collective.save)
        copied, copies = _on_host(state, mesh)

        def write() -> None:
            for done in copies:
                done.synchronize()
            save(self._folder, step, copied, self._keep, for_good)

        self._running = self._writer.submit(write)

    def poll(self) -> None:
        """Call `wait` if the save is over."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the running save, and note it if it failed; raises as `save` does."""
        if not self._finish():
            return
        line = self._failed[-1]
        if len(self._failed) >= _FAILURES:
            self._failed.clear()
            raise CheckpointError(f"{line}; the save failed {_FAILURES} times in a row")
        self._note(f"{line}; training goes on")

    def close(self) -> None:
        """Wait for the running save; raises its error, and CheckpointError where the last save failed."""
        try:
            self._finish()
        finally:
            self._writer.shutdown()
        failed, self._failed = self._failed, []
        if failed:
            raise CheckpointError(failed[-1])

    def __enter__(self) -> "BackgroundSaver":
        return self

    def __exit__(self, _: object, error: BaseException | None, *_trace: object) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            self._note(str(failure))

    def _finish(self) -> bool:
        """Wait for the running save and return True if a CheckpointError ended it; any other error is raised."""
        if self._running is None:
            return False
        failure = self._running.exception()
        self._running = None
        if failure is None:
            self._failed.clear()
            return False
        if not isinstance(failure, CheckpointError):
            raise failure
        self._failed.append(str(failure))
        return True


def _on_host(state: Any, mesh: DeviceMesh | None) -> tuple[Any, list["torch.cuda.Event"]]:
    """Copy nested containers of tensors to the host; the copy is complete once the events are over.

    Storages are copied whole, once each, and tensors that share one in `state` share one in the copy: torch.save writes
    the same bytes of both. Of divided tensors this rank's part is copied, and they lie in `mesh` then.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}
    devices = set()
    for tensor in tree_leaves(state):
        if not isinstance(tensor, Tensor):
            continue
        own = own_part(tensor)
        source = own.untyped_storage()
        # torch.save, too, tells storages apart by this; empty ones all have the address 0.
        key = source._cdata
        if key not in storages:
            storages[key] = _copy(source)
            devices.add(source.device)
        copied = torch.empty(0, dtype=own.dtype)
        copied.set_(storages[key], own.storage_offset(), own.size(), own.stride())
        if isinstance(tensor, DTensor):
            whole = {"shape": tensor.shape, "stride": tensor.stride()}
            copied = DTensor.from_local(copied, mesh, tensor.placements, run_check=False, **whole)
        copies[id(tensor)] = copied
    events = [torch.cuda.current_stream(device).record_event() for device in devices if device.type == "cuda"]
    # Containers are copied with their attributes; for each tensor the copy that is there already is taken.
    return copy.deepcopy(state, copies), events


def _copy(source: torch.UntypedStorage) -> torch.UntypedStorage:
    """Copy the bytes to the host's memory; from CUDA into pinned memory, in the order of the current stream."""
    on_cuda = source.device.type == "cuda"
    bytes_N = torch.empty(source.nbytes(), dtype=torch.uint8, pin_memory=on_cuda)
    bytes_N.copy_(torch.empty(0, dtype=torch.uint8, device=source.device).set_(source), non_blocking=on_cuda)
    return bytes_N.untyped_storage()
