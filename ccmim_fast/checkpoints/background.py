"""Checkpoints are written while training goes on: the state is copied at once, and a thread writes the copy.

On CUDA the copy is only enqueued: the order of the stream keeps it before the next step's changes, and the thread waits
for it. On a CPU it is made before `save` returns. Until it is written it takes as much memory on the host as the state.
No buffer is kept here: torch keeps pinned memory, and the C library that of a CPU run (engine/build.py), so that
the next save finds it mapped already.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.collective import CollectiveWriter, Layout
from ccmim_fast.checkpoints.distributed import divide
from ccmim_fast.errors import CheckpointError
from ccmim_fast.optim.update import own_part

_FAILURES = 3  # saves in a row that may not fail; fewer are a warning


class BackgroundSaver:
    """Saves the checkpoints of a run, one at a time, in the order in which they were asked for.

    A save that fails, on a full disk or the like, is a warning; the third in a row, and the last of all, are an error.
    The thread reports nothing: failures come out of the next `save`, `poll`, `wait` or `close`. The saver is a context
    manager that closes at the end; where an error ends the run, a failed save only adds a line.

    Args:
        folder: of the checkpoints.
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
        """Begin to save `state` as it is now; it may be changed in place afterwards. Waits for the save before.

        Args:
            step, state, for_good: as for `io.save`; the tensors are dense.

        Raises:
            CheckpointError: three saves in a row have failed.
            Exception: the save before raised it.
        """
        self.wait()
        if self._collective is None:
            copied, copies = _on_host(state)
            write = functools.partial(io.save, self._folder, step, copied)
        else:
            rest, pieces = divide(state)
            layouts = {name: Layout.of(piece) for name, piece in pieces.items()}
            copied, copies = _on_host([rest, {name: own_part(piece) for name, piece in pieces.items()}])
            write = functools.partial(self._collective.save, self._folder, step, *copied, layouts)
        self._running = self._writer.submit(_write, write, (self._keep, for_good), copies)

    def poll(self) -> None:
        """Call `wait` if the save is over."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the running save, and note it if it failed; raises as `save` does."""
        told = len(self._failed)
        self._finish()
        if len(self._failed) > told:
            if len(self._failed) >= _FAILURES:
                raise CheckpointError(f"{self._take_last()}; the save failed {_FAILURES} times in a row")
            self._note(f"{self._failed[-1]}; training goes on")

    def close(self) -> None:
        """Wait for the running save.

        Raises:
            CheckpointError: the last save failed.
            Exception: the last save raised something else.
        """
        try:
            self._finish()
        finally:
            self._writer.shutdown()
        if self._failed:
            raise CheckpointError(self._take_last())

    def __enter__(self) -> "BackgroundSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            self._note(str(failure))

    def _finish(self) -> None:
        """Wait for the running save and count it; raises any error but CheckpointError."""
        if self._running is None:
            return
        failure = self._running.exception()
        self._running = None
        if failure is None:
            self._failed.clear()
        elif isinstance(failure, CheckpointError):
            self._failed.append(str(failure))
        else:
            raise failure

    def _take_last(self) -> str:
        """Return the last failure, which is about to be raised, and forget it."""
        line = self._failed[-1]
        self._failed.clear()
        return line


def _write(write: Callable[[int, bool], Any], how: tuple[int, bool], copies: list["torch.cuda.Event"]) -> None:
    for done in copies:
        done.synchronize()
    write(*how)


def _on_host(state: Any) -> tuple[Any, list["torch.cuda.Event"]]:
    """Copy nested containers of tensors to the host; the copy is complete once the events are over.

    Storages are copied whole, once each, and tensors that share one in `state` share one in the copy: torch.save writes
    the same bytes of both.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}
    devices = set()
    for tensor in _tensors(state):
        source = tensor.untyped_storage()
        # torch.save, too, tells storages apart by this; empty ones all have the address 0.
        key = source._cdata
        if key not in storages:
            storages[key] = _copy(source)
            devices.add(source.device)
        view = torch.empty(0, dtype=tensor.dtype)
        copies[id(tensor)] = view.set_(storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())
    events = [torch.cuda.current_stream(device).record_event() for device in devices if device.type == "cuda"]
    # Containers are copied with their attributes; for each tensor the copy that is there already is taken.
    return copy.deepcopy(state, copies), events


def _copy(source: torch.UntypedStorage) -> torch.UntypedStorage:
    """Copy the bytes to the host's memory; from CUDA into pinned memory, in the order of the current stream."""
    on_cuda = source.device.type == "cuda"
    bytes_N = torch.empty(source.nbytes(), dtype=torch.uint8, pin_memory=on_cuda)
    bytes_N.copy_(torch.empty(0, dtype=torch.uint8, device=source.device).set_(source), non_blocking=on_cuda)
    return bytes_N.untyped_storage()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
